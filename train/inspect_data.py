"""What a data set holds and how training would read it: ``python -m train.inspect_data PATH [--resolution 1024 ...]``.

Videos are told by the names of files, or by ``--clips``: see ``train.inspect_clips``; and so are zip files of latents,
or by ``--format zip_latents``: see ``train.inspect_worlds``.

Counts, sizes, shapes and the sizes that they are trained at, captions, further columns, and every file that can't be
used, by name. No model is needed, and nothing is written but the contact sheet that ``--contact-sheet`` asks for.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from configs.data import ImageDataConfig
from kernels.typing import UInt8
from sana_jax.command_line import parse
from sana_jax.errors import UserError, run_command_line
from sana_jax.images import check_png_path, image_grid, save_png
from train.data.buckets import BucketPlan, assign_buckets, size_table
from train.data.captions import CaptionRule, caption_weights, check_scores
from train.data.conditions import FILTERS, declared_conditions, missing_input, unreadable_input
from train.data.decoding import BadPicture, decode_picture, resize_and_crop_to
from train.data.formats import names_below
from train.data.records import Caption
from train.data.source import (
    IndexedSource,
    Problem,
    Record,
    index_source,
    refuse_missing_captions,
    refuse_no_pictures,
    refuse_too_many_bad,
)
from train.data.sources.listing import CLIP_SUFFIXES, PICTURE_SUFFIXES
from train.data.splits import split

PROG = "python -m train.inspect_data"
_SHEET = 48  # pictures of a contact sheet
_CELL = 160  # px
_THREADS = 4
_SHOWN = 3  # examples


@dataclass(frozen=True)
class InspectConfig(ImageDataConfig):
    """Reports what a data set holds. The options are those of --data in training; the path may come first. Those for
    videos, --cameras among them, are listed by --clips --help, and those for latents by --format zip_latents --help."""

    batch_size: int = 16
    """Sizes with fewer pictures than this are rare."""
    check_pixels: bool = True
    """Decode every picture, control pictures included, which finds the truncated ones; False reads headers alone."""
    contact_sheet: str | None = None
    """Also draw some of the pictures, as they are trained, into this PNG."""
    clips: bool = False
    """Look for videos. Without it a folder that has videos and no pictures is looked through for videos too, unless
    --no-clips says otherwise."""
    cache: None = field(default=None, init=False)
    latent_dtype: Literal["auto"] = field(default="auto", init=False)

    def __post_init__(self):
        super().__post_init__()
        check_options(self)


def in_training_alone(option: str) -> str | None:
    """What to say of an option that training has and a report does not; None for others."""
    if option in ("cache", "latent-dtype"):
        return "it is for training, and nothing is prepared here: leave it out"
    if option.startswith("joint-"):
        return (
            "pictures beside clips are inspected by themselves: leave it out, and give their own path with --no-clips"
        )
    return None


def check_options(config: Any) -> None:
    """Refuses what neither kind of report can do; ``config`` is an InspectConfig or an InspectClipsConfig."""
    if config.batch_size < 1:
        raise UserError(f"--batch-size {config.batch_size} is not allowed; choose 1 or more")
    if config.contact_sheet is not None:
        check_png_path(config.contact_sheet)


def inspect(config: InspectConfig, say: Callable[[str], None] = print) -> bool:
    """Reports line by line; returns whether nothing would stop training.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UserError: it is of no known format, or has no picture that can be used.
    """
    declared_conditions(config.conditions)  # kinds that there are not, before anything is read
    source = index_source(config)
    if config.check_pixels:
        _check_pixels(source)
    say_head(source, (), say)
    pictures = [record for record in source.records if record.size is not None]
    plan = None
    if pictures:
        for line in describe_sizes([record.size for record in pictures]):
            say(line)
        table = size_table(32, 32, config.resolution or 1024, aspect_buckets=config.aspect_buckets)
        sizes = [record.size for record in pictures]
        plan = assign_buckets(sizes, table, minimum=config.batch_size, rare=config.rare_buckets)
        for line in _describe_buckets(plan, assign_buckets(sizes, table, minimum=1), config):
            say(line)
    for line in (*describe_captions(source), *describe_columns(source), *describe_groups(source, config)):
        say(line)
    for line in (*_describe_features(source), *_describe_conditions(source, config)):
        say(line)
    trains = not say_what_stops_training(
        say,
        lambda: _refuse_conditions(source, config, say),
        lambda: refuse_missing_captions(source, config),
        lambda: say_choice(source, config, say),
    )
    if config.contact_sheet is not None:
        if plan is None:
            raise UserError(f"--contact-sheet {config.contact_sheet}: {source.name} has features and no pictures")
        _draw_sheet(source, pictures, plan, config)
        say(f"contact sheet: {config.contact_sheet}")
    return trains


def say_head(source: IndexedSource, damaged: Sequence[Problem], say: Callable[[str], None]) -> None:
    """What there is, and every file with something wrong; ``damaged`` can be used up to where the damage is.

    Raises:
        UserError: nothing can be used.
    """
    say(f"{source.name}: {source.kind}")
    say(f"usable: {len(source)} of {source.looked_at}")
    for problem in source.problems:
        say(f"unusable: {problem.name} {problem.reason}")
    for problem in damaged:
        say(f"damaged: {problem.name} {problem.reason}; the frames before that can be used")
    for note in source.notes:
        say(f"note: {note}")
    for same in source.duplicates:
        say(f"same name: {', '.join(same)}")
    refuse_no_pictures(source)


def say_what_stops_training(say: Callable[[str], None], *checks: Callable[[], None]) -> bool:
    """Makes the checks that training makes, says which would end it, and returns whether one would."""
    stops = False
    for check in checks:
        try:
            check()
        except UserError as error:
            stops = True
            say(f"training would stop: {str(error).replace('--data.', '--')}")
    return stops


def _check_pixels(source: IndexedSource) -> None:
    """Moves the records whose pixels can't be read to the source's problems."""
    from tqdm import tqdm

    def look(record: Record) -> Problem | None:
        if record.size is None:
            return None
        try:
            decode_picture(source.read(record), name=source.name_of(record), channels=3)
        except BadPicture as error:
            return Problem(error.name, error.reason)
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(tqdm(pool.map(look, source.records), "decoding", total=len(source), disable=None, leave=False))
    bad = {record.key for record, problem in zip(source.records, found) if problem is not None}
    source.problems += [problem for problem in found if problem is not None]
    source.records = [record for record in source.records if record.key not in bad]
    source.without_caption = [key for key in source.without_caption if key not in bad]


def spread(values: Sequence[float], form: str) -> str:
    """The least, the most and the median of numbers."""
    return f"{min(values):{form}} to {max(values):{form}}, median {statistics.median(values):{form}}"


def describe_sizes(sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Heights, widths and shapes."""
    heights, widths = zip(*sizes)
    return [
        f"height: {spread(heights, '.0f')} px",
        f"width: {spread(widths, '.0f')} px",
        f"shorter side: {spread([min(size) for size in sizes], '.0f')} px",
        f"height / width: {spread([height / width for height, width in sizes], '.2f')}",
    ]


def _describe_buckets(plan: BucketPlan, unmerged: BucketPlan, config: InspectConfig) -> list[str]:
    """Each size with its count, before rare ones are dealt with; then what is done about those."""
    most = max(unmerged.counts)
    lines = [f"trained at, for --resolution {config.resolution or 1024} (height x width, pictures):"]
    for bucket, count in zip(unmerged.buckets, unmerged.counts):
        rare = f"  rare: fewer than --batch-size {config.batch_size}" if count < config.batch_size else ""
        bar = "#" * max(1, round(30 * count / most))
        lines.append(f"  {bucket!s:>9} {count:>7} {bar}{rare}")
    return [*lines, *plan.lines[1:]]


def describe_captions(source: IndexedSource) -> list[str]:
    """How many captions there are, of which kinds, and some of them."""
    captions = [caption for record in source.records for caption in record.captions if caption.text]
    lines = [f"captions: {len(captions)}, {len({caption.text for caption in captions})} different"]
    if captions:
        words = [len(caption.text.split()) for caption in captions]
        lines.append(f"words in a caption: {min(words)} to {max(words)}, median {statistics.median(words):.0f}")
        several = sum(len(record.captions) > 1 for record in source.records)
        kinds = Counter(caption.kind for caption in captions)
        if several or len(kinds) > 1:
            listed = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
            lines.append(f"{source.media.many} with several captions: {several}; kinds: {listed}")
        scores = [caption.score for caption in captions if caption.score is not None]
        if scores:
            lines.append(f"scores of captions: {len(scores)}, {min(scores):g} to {max(scores):g}")
        texts = dict.fromkeys(caption.text for caption in captions)
        lines += [f"  for example: {short(text)}" for text in list(texts)[:_SHOWN]]
    missing = source.without_caption
    if missing:
        some = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        lines.append(f"without a caption: {len(missing)}: {some}")
    return lines


def say_choice(source: IndexedSource, config: ImageDataConfig, say: Callable[[str], None]) -> None:
    """How often each kind of caption will be taken.

    Raises:
        UserError: a picture has none of a kind that may be, or none has a score where they are chosen by it.
    """
    say_scores((record.captions for record in source.records), config, say)
    rule, shares, pictures = CaptionRule.of(config), Counter(), 0
    for record in source.records:
        if not record.captions:
            continue
        weights = caption_weights(record.captions, rule)
        pictures += 1
        for caption, weight in zip(record.captions, weights):
            shares[caption.kind] += weight / sum(weights)
    if len(shares) > 1:
        listed = ", ".join(f"{kind} {share / pictures:.0%}" for kind, share in shares.items())
        say(f"captions by --caption-choice {config.caption_choice}: {listed}")


def say_scores(captions: Iterable[Sequence[Caption]], config: ImageDataConfig, say: Callable[[str], None]) -> None:
    """Where captions are chosen by their scores and only some have one, a line that says so.

    Raises:
        UserError: none has one.
    """
    if note := check_scores(captions, config):
        say(f"note: {note.replace('--data.', '--')}")


def _describe_conditions(source: IndexedSource, config: InspectConfig) -> list[str]:
    lines = []
    for text, declared in zip(config.conditions, declared_conditions(config.conditions)):
        count = sum(missing_input(declared, record) is None for record in source.records)
        what = f"have {declared.name}" if declared.kind not in FILTERS else "have a picture that it is drawn from"
        lines.append(f"condition {text}: {count} of {len(source)} samples {what}")
    variants = config.crops * (1 + config.flip)
    return lines if variants == 1 else [*lines, f"variants of each picture: {variants} (crops and mirror images)"]


def _refuse_conditions(source: IndexedSource, config: InspectConfig, say: Callable[[str], None]) -> None:
    """Names the samples that training leaves out for what they have as a condition, or do not have, and stops where
    they and the unusable files are too many.

    Raises:
        UserError: that, or a column of a condition that names no file.
    """
    declared, found = declared_conditions(config.conditions), []
    for record in source.records:
        reasons = [missing_input(condition, record) for condition in declared]
        if config.check_pixels and not any(reasons):
            reasons = [unreadable_input(condition, source, record) for condition in declared]
        if reason := next(filter(None, reasons), None):
            found.append(Problem(record.key, reason))
            say(f"left out: {record.key} {reason}")
    refuse_too_many_bad([*source.problems, *found], source.looked_at, config.max_bad_share)


def describe_columns(source: IndexedSource) -> list[str]:
    """What each further column holds."""
    names = dict.fromkeys(name for record in source.records for name in record.columns)
    return [f"column {name}: {_describe_column(source, name)}" for name in names]


def _describe_column(source: IndexedSource, name: str) -> str:
    values: list[Any] = [record.columns[name] for record in source.records if name in record.columns]
    missing = len(source) - len(values)
    some = "" if not missing else f", missing in {missing}"
    if all(isinstance(value, bool) for value in values):
        return f"{sum(values)} true, {len(values) - sum(values)} false{some}"
    if all(isinstance(value, int | float) for value in values):
        return f"numbers from {min(values):g} to {max(values):g}{some}"
    if all(isinstance(value, str) for value in values):
        return f"texts, {len(set(values))} different, such as {short(values[0])!r}{some}"
    kinds = ", ".join(sorted({type(value).__name__ for value in values}))
    return f"{kinds}, such as {short(str(values[0]))}{some}"


def describe_groups(source: IndexedSource, config: ImageDataConfig) -> list[str]:
    """Groups, and how many go into each side of the split."""
    groups = Counter(record.group for record in source.records if record.group is not None)
    lines = []
    if groups:
        lines.append(f"groups: {len(groups)}, of {min(groups.values())} to {max(groups.values())} {source.media.many}")
    if config.validation_share:
        training, validation = split(source.records, config.validation_share)
        lines.append(f"split: {len(training)} to train, {len(validation)} to validate (with seed 0)")
    return lines


def _describe_features(source: IndexedSource) -> list[str]:
    holding = [record for record in source.records if source.has_features(record)]
    if not holding:
        return []
    try:
        arrays = source.features(holding[0])
    except BadPicture as error:
        return [f"features: beside {len(holding)} samples; {error}"]
    shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in arrays.items())
    return [f"features: beside {len(holding)} samples; {holding[0].key} has {shapes}"]


def _draw_sheet(source: IndexedSource, pictures: list[Record], plan: BucketPlan, config: InspectConfig) -> None:
    """Pictures that are spread evenly over the data, cut as they are trained, each in a cell of the same size."""
    chosen = np.unique(np.linspace(0, len(pictures) - 1, min(_SHEET, len(pictures))).round().astype(int)).tolist()
    cells, labels = [], []
    for index in chosen:
        record, bucket = pictures[index], plan.buckets[plan.bucket_of[index]]
        try:
            picture = decode_picture(source.read(record), name=source.name_of(record), channels=3)
        except BadPicture:  # named above, if pixels were asked for
            continue
        cells.append(picture_cell(picture, bucket.height, bucket.width))
        label = short(record.key.rpartition("/")[2], 24)
        labels.append(label.encode("ascii", "replace").decode())
    if not cells:
        raise UserError(f"--contact-sheet {config.contact_sheet}: none of the pictures can be decoded")
    save_png(config.contact_sheet, image_grid(cells, labels=labels))


def picture_cell(picture: UInt8[np.ndarray, "H W 3"], height: int, width: int):
    """A picture cut to a shape, in the middle of a square of a contact sheet."""
    from PIL import Image

    scale = _CELL / max(height, width)
    small = resize_and_crop_to(picture, max(1, round(height * scale)), max(1, round(width * scale)))
    cell = Image.new("RGB", (_CELL, _CELL), (235, 235, 235))
    cell.paste(Image.fromarray(small), ((_CELL - small.shape[1]) // 2, (_CELL - small.shape[0]) // 2))
    return cell


def short(text: str, most: int = 100) -> str:
    """A text, or its beginning."""
    return text if len(text) <= most else text[: most - 3] + "..."


def _about_clips(arguments: Sequence[str]) -> bool:
    """Whether a command line is about videos: it says so, or its folder has videos and no pictures beside them."""
    if any(word in ("--clips", "--clips=True", "--cameras", "--cameras=True") for word in arguments):
        return True
    places = [place for place, word in enumerate(arguments[:-1]) if word == "--path"]
    if "--no-clips" in arguments or not places or not os.path.isdir(arguments[places[0] + 1]):
        return False
    suffixes = {os.path.splitext(name)[1].lower() for name in names_below(pathlib.Path(arguments[places[0] + 1]))}
    return bool(suffixes & (set(CLIP_SUFFIXES) - {".gif"})) and not suffixes & set(PICTURE_SUFFIXES)


def _about_latents(arguments: Sequence[str]) -> bool:
    """Whether a command line is about zip files of latents: it says so, or its folder has no others."""
    places = [place for place, word in enumerate(arguments[:-1]) if word in ("--path", "--format")]
    given = {arguments[place]: arguments[place + 1] for place in places}
    if "--format" in given or "--path" not in given:
        return given.get("--format") == "zip_latents"
    path = pathlib.Path(given["--path"])
    suffixes = {os.path.splitext(name)[1].lower() for name in names_below(path)} if path.is_dir() else {path.suffix}
    others = {*PICTURE_SUFFIXES, *CLIP_SUFFIXES, ".tar", ".parquet", ".arrow"}
    return ".zip" in suffixes and not suffixes & others


def main(argv: Sequence[str] | None = None) -> int:
    """The command: a path, then options; its exit status is 1 where training would stop.

    Raises:
        UserError: an option that is not allowed, or data that cannot be trained on.
        FileNotFoundError: there is no data.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--path", *arguments]
    try:
        if _about_latents(arguments):
            from train.inspect_worlds import InspectLatentsConfig, inspect_latents

            trains = inspect_latents(parse(InspectLatentsConfig, arguments, prog=PROG, elsewhere=in_training_alone))
        elif _about_clips(arguments):
            from train.inspect_clips import InspectClipsConfig, inspect_clips

            trains = inspect_clips(parse(InspectClipsConfig, arguments, prog=PROG, elsewhere=in_training_alone))
        else:
            trains = inspect(parse(InspectConfig, arguments, prog=PROG, elsewhere=in_training_alone))
    except UserError as error:  # the options are those of training, without their group
        raise UserError(str(error).replace("--data.", "--")) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error).replace("--data.", "--")) from error
    return 0 if trains else 1


if __name__ == "__main__":
    run_command_line(main)
