"""Which of a picture's captions is taken, as a pure function of a uniform number."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from configs.data import ClipPicturesConfig, ImageDataConfig
from sana_jax.errors import UserError
from train.data.sources.rows import SCORE_COLUMNS, as_number

if TYPE_CHECKING:
    from train.data.source import Caption, Record

_Entry = TypeVar("_Entry")
DEFAULT_KIND = "prompt"
_COLDEST = 0.01  # temperatures below it act like it


@dataclass(frozen=True)
class CaptionRule:
    """How a caption is chosen.

    Attributes:
        choice: ``first``; ``random``: each alike; ``clipscore``: among those of ``threshold`` or more, in proportion
            to score^(1/temperature); where none is, the best; where none has a score, the one of kind ``prompt``;
            ``proportion``: in proportion to the weight of their kind.
        threshold: of the score.
        temperature: of the draw by score.
        weights: of each kind of caption; kinds that are not in it are not taken.
    """

    choice: Literal["random", "first", "clipscore", "proportion"] = "random"
    threshold: float = 25.0
    temperature: float = 0.1
    weights: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(config: ImageDataConfig) -> CaptionRule:
        """The rule that a configuration describes."""
        return CaptionRule(
            config.caption_choice, config.clip_threshold, config.clip_temperature, dict(config.weights())
        )


def choose_caption(captions: Sequence[Caption], rule: CaptionRule, u: float) -> Caption:
    """The caption that a uniform number in [0, 1) picks.

    Raises:
        UserError: no captions, or with ``proportion`` none of a kind that has a weight.
    """
    return captions[chosen_index(caption_ends(captions, rule), u)]


def caption_ends(captions: Sequence[Caption], rule: CaptionRule) -> tuple[float, ...]:
    """Up to where in [0, 1) each caption is picked: what ``chosen_index`` reads, for captions that are kept.

    Raises:
        UserError: as ``choose_caption``.
    """
    if not captions:
        raise UserError("a picture has no caption to choose from; give it one, or set --data.missing-captions")
    totals = list(itertools.accumulate(caption_weights(captions, rule)))
    return tuple(total / totals[-1] for total in totals)


def chosen_index(ends: Sequence[float], u: float) -> int:
    """The caption that a uniform number in [0, 1) picks, by its number; never one of weight 0, even at 1."""
    return min(bisect_right(ends, u), bisect_left(ends, ends[-1]))


def caption_weights(captions: Sequence[Caption], rule: CaptionRule) -> list[float]:
    """How often each caption is taken, relative to the others; 0 for never.

    Raises:
        UserError: with ``proportion``, none is of a kind that has a weight.
    """
    if rule.choice == "first":
        return [float(index == 0) for index in range(len(captions))]
    if rule.choice == "random":
        return [1.0] * len(captions)
    if rule.choice == "clipscore":
        return _weights_by_score(captions, rule)
    weights = [float(rule.weights.get(caption.kind, 0.0)) for caption in captions]
    if not any(weights):
        kinds = ", ".join(dict.fromkeys(caption.kind for caption in captions))
        raise UserError(
            f"a picture has captions of kind {kinds}, and --data.proportions gives a weight to "
            f"{', '.join(rule.weights) or 'none'} alone: add a weight, as in {captions[0].kind}=1"
        )
    return weights


def _weights_by_score(captions: Sequence[Caption], rule: CaptionRule) -> list[float]:
    scored = [caption.score for caption in captions if caption.score is not None]
    if not scored:
        kinds = [caption.kind for caption in captions]
        default = kinds.index(DEFAULT_KIND) if DEFAULT_KIND in kinds else 0
        return [float(index == default) for index in range(len(captions))]
    best = max(scored)
    if best < rule.threshold or best <= 0:
        first = next(index for index, caption in enumerate(captions) if caption.score == best)
        return [float(index == first) for index in range(len(captions))]
    power, least = 1 / max(rule.temperature, _COLDEST), max(rule.threshold, 0)
    scores = [least - 1 if caption.score is None else caption.score for caption in captions]
    # relative to the best, so that a high power of a score stays finite
    return [(score / best) ** power if score >= least else 0.0 for score in scores]


def check_scores(captions: Iterable[Sequence[Caption]], config: ImageDataConfig) -> str | None:
    """A line where only some captions have the score that ``caption_choice`` clipscore chooses by; None for others.

    Args:
        captions: of each sample.
        config: the choice. Pictures beside clips share it with them, and need have no scores.

    Raises:
        UserError: no caption of the data has a score, so that there is nothing to choose by.
    """
    if config.caption_choice != "clipscore":
        return None
    scored = [[caption.score is not None for caption in own if caption.text] for own in captions]
    count, total = sum(map(sum, scored)), sum(map(len, scored))
    if count == total:
        return None
    if count or isinstance(config, ClipPicturesConfig):
        without = sum(bool(own) and not any(own) for own in scored)
        return (
            f"{count} of {total} captions have a score for --data.caption-choice clipscore; captions without one are "
            f"taken only in the {without} samples where none has one"
        )
    raise UserError(
        f"--data.caption-choice clipscore: none of the {total} captions has a score; give the data one per caption "
        f"({', '.join(SCORE_COLUMNS[:3])}), or choose --data.caption-choice random"
    )


def fill_caption(template: str, columns: Mapping[str, Any], own: str | None = None) -> str:
    """One caption for every picture, with the picture's columns, and its own caption, in braces.

    Raises:
        UserError: a name in braces that is no column, or braces that don't fit.
    """
    values = {**columns, **({} if own is None else {"caption": own})}
    try:
        return template.format_map(values)
    except KeyError as error:
        names = ", ".join(sorted(map(str, values))) or "none"
        raise UserError(
            f"--data.caption {template!r} names {{{error.args[0]}}}, which a picture does not have; it has {names}: "
            "correct the name, or write {{ and }} for braces that are meant as such"
        ) from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(
            f"--data.caption {template!r} can't be filled in ({error}); allowed are names of columns in braces, as in "
            "'a photo of {name}'; write {{ and }} for braces that are meant as such"
        ) from error


def with_motion_scores(
    records: Sequence[tuple[_Entry, Record]], motion_score: str | None
) -> list[tuple[_Entry, Record]]:
    """Captions that end in " motion score: N.", as SANA-Video is trained and asked with: N is a score's whole part.

    Args:
        records: videos, each with something that stays as it is.
        motion_score: a number for all, or the column that holds each one's; None: nothing is appended.

    Raises:
        UserError: a video has no number in that column.
    """
    if motion_score is None:
        return list(records)
    fixed = as_number(motion_score)
    scores = [as_number(record.columns.get(motion_score)) if fixed is None else fixed for _, record in records]
    if missing := [record.key for (_, record), score in zip(records, scores) if score is None]:
        names = ", ".join(dict.fromkeys(name for _, record in records for name in record.columns)) or "none"
        raise UserError(
            f"--data.motion-score {motion_score}: {len(missing)} of {len(records)} videos have no number of that name: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; choose a number for all, or a column that "
            f"every video has (there are: {names})"
        )
    done = []
    for (entry, record), score in zip(records, scores):
        texts = (f"{caption.text} motion score: {int(score)}.".strip() for caption in record.captions)
        captions = tuple(caption._replace(text=text) for caption, text in zip(record.captions, texts))
        done.append((entry, replace(record, captions=captions)))
    return done
