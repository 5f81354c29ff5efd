"""A row of a manifest, a table or a JSON file: which of its columns are the picture, captions, scores, and the rest."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from train.data.records import Caption
from train.data.sources.listing import PICTURES, clean_text

PICTURE_COLUMNS = PICTURES.columns
CAPTION_COLUMNS = ("text", "caption", "prompt", "texts", "captions", "prompts")
SCORE_COLUMNS = ("clip_score", "clip_scores", "clipscore", "score", "scores")
KEY_COLUMNS = ("key", "__key__")
_SINGULAR = {"texts": "text", "captions": "caption", "prompts": "prompt"}


class Row(NamedTuple):
    """A row, sorted out.

    Attributes:
        key: the row's own name, where it has one.
        picture: what the picture's column holds.
        captions: those with a text.
        columns: everything else.
        size: (height, width), where both are there.
    """

    key: str | None
    picture: Any
    captions: tuple[Caption, ...]
    columns: dict[str, Any]
    size: tuple[int, int] | None


def picture_column(columns: Collection[str], names: Collection[str] = PICTURE_COLUMNS) -> str | None:
    """The column that holds the picture, or whatever may be called ``names``; None where there is none."""
    lowered = {column.lower(): column for column in reversed(list(columns))}
    return next((lowered[name] for name in names if name in lowered), None)


def sort_out(row: Mapping[str, Any], picture: str | None, kinds: Collection[str] = ()) -> Row:
    """Which column is what.

    Args:
        row: values by column.
        picture: the picture's column.
        kinds: further columns that are captions.
    """
    rest = {str(name): value for name, value in row.items() if name is not None and not _is_missing(value)}
    found = rest.pop(picture, None) if picture is not None else None
    key = next((str(rest.pop(name)) for name in KEY_COLUMNS if name in rest), None)
    scores = _scores(rest)
    names = [name for name in rest if name.lower() in CAPTION_COLUMNS or name in kinds]
    names += [name for name in rest if name in scores and name not in names and isinstance(rest[name], str)]
    captions: list[Caption] = []
    for name in names:
        captions += _captions(rest.pop(name), _SINGULAR.get(name.lower(), name), scores)
    size = None
    if _is_length(rest.get("height")) and _is_length(rest.get("width")):
        size = int(rest.pop("height")), int(rest.pop("width"))
    return Row(key, found, tuple(captions), rest, size)


def without_repeats(captions: Sequence[Caption], kinds: Collection[str]) -> list[Caption]:
    """Captions of which each text is there once, as where a picture's .txt and its .json both have it.

    The first stays, with the score that another may have; those of the kinds that are chosen by stay all.
    """
    kept: dict[tuple[str, str | None], Caption] = {}
    asked = {caption.text for caption in captions if caption.kind in kinds}
    for caption in captions:
        own = caption.kind in kinds
        if not own and caption.text in asked:
            continue
        key = caption.text, caption.kind if own else None
        before = kept.setdefault(key, caption)
        if before.score is None:
            kept[key] = before._replace(score=caption.score)
    return list(kept.values())


def _is_missing(value: Any) -> bool:
    """Whether a cell says nothing; pandas writes NaN there."""
    return value is None or value == "" or (isinstance(value, float) and value != value)


def _is_length(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 1 and value == value // 1


def as_number(value: Any) -> float | None:
    """A number, or a text that is one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None


def _scores(rest: dict[str, Any]) -> dict[str | int, float]:
    """Scores by kind of caption, or by place in the list of captions; they leave the columns."""
    found: dict[str | int, float] = {}
    has_captions = any(name.lower() in CAPTION_COLUMNS for name in rest)
    for name in [name for name in rest if name.lower() in SCORE_COLUMNS]:
        value = _parsed(rest[name])
        if isinstance(value, Mapping):
            found |= {str(kind): number for kind, each in value.items() if (number := as_number(each)) is not None}
        elif isinstance(value, list):
            found |= {place: number for place, each in enumerate(value) if (number := as_number(each)) is not None}
        elif has_captions and name.lower().startswith("clip") and (number := as_number(value)) is not None:
            found[0] = number
        else:
            continue
        del rest[name]
    return found


def _captions(value: Any, kind: str, scores: Mapping[str | int, float]) -> list[Caption]:
    value = _parsed(value)
    if isinstance(value, Mapping) and "text" not in value:
        items = [(str(name), each) for name, each in value.items()]
    elif isinstance(value, list | tuple):
        items = [(kind, each) for each in value]
    else:
        items = [(kind, value)]
    captions = []
    for place, (name, each) in enumerate(items):
        score = scores.get(name, scores.get(place))
        if isinstance(each, Mapping):
            name, score = str(each.get("kind", name)), as_number(each.get("score", score))
            each = each.get("text")
        text = "" if _is_missing(each) else clean_text(str(each))
        if text:
            captions.append(Caption(text, name, score))
    return captions


def _parsed(value: Any) -> Any:
    """A list or an object that a CSV holds as JSON text."""
    if isinstance(value, str) and value[:1] in "[{" and value[-1:] in "]}":
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
