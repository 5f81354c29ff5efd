"""Pictures or videos with captions, wherever they lie: one interface over folders, manifests, tars and Hugging Face
datasets.

``open_source`` looks at a path, finds out its format, reads the headers of its pictures (not their pixels) and gives a
list of records with a way to read their bytes. Nothing is written beside the user's data.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from configs.data import ImageDataConfig, VideoDataConfig
from sana_jax.errors import UserError, reason_of
from train.data.captions import check_scores, fill_caption, with_motion_scores
from train.data.decoding import BadPicture, Header, read_header
from train.data.formats import list_samples
from train.data.records import Caption, Problem, Record, Say, shown
from train.data.score_limits import passes
from train.data.sources.listing import (
    CLIPS,
    PICTURES,
    Blob,
    Entry,
    FileBlob,
    Listing,
    Media,
    read_blob,
)
from train.data.sources.rows import CAPTION_COLUMNS
from train.data.stamps import stamp, stamp_of

if TYPE_CHECKING:
    from train.data.video.containers import ClipHeader

__all__ = [
    "Caption",
    "ImageSource",
    "IndexedSource",
    "Problem",
    "Record",
    "index_source",
    "open_source",
    "refuse_missing_captions",
    "refuse_no_pictures",
    "refuse_too_many_bad",
]

_THREADS = 8  # that open files: they wait for the disk, or for a network's
_LISTED = 10  # names in a message


class ImageSource(Protocol):
    """What every format offers."""

    name: str
    records: Sequence[Record]
    problems: Sequence[Problem]

    def __len__(self) -> int:
        """Records."""
        ...

    def read(self, record: Record, column: str | None = None) -> bytes:
        """The picture's file, or that of the picture which a column names.

        Raises:
            BadPicture: it can't be read.
            UserError: there is no such column, or it names no picture.
        """
        ...

    def features(self, record: Record) -> Mapping[str, np.ndarray]:
        """Arrays stored beside the picture (latents, encoded captions) by name; empty where there are none.

        Raises:
            BadPicture: they can't be read.
        """
        ...

    def describe(self) -> str:
        """One line for the start of a run."""
        ...


class IndexedSource:
    """A listing whose headers have been read.

    Attributes:
        name: the path, as it was given.
        media: pictures or videos.
        kind: the format in words.
        records: the samples that can be used, in a fixed order.
        problems: files that can't be used.
        notes: lines about what was left out, and what is done to pictures.
        without_caption: keys of the records that have none of their own.
        duplicates: pictures that share a name.
        has_rows: whether captions are in columns, as ``Listing`` says.
        tables: likewise.
        looked_at: files that could be pictures, the unusable ones included.
    """

    def __init__(self, name: str, listing: Listing, media: Media = PICTURES):
        self.name, self.kind, self.media = name, listing.kind, media
        self.problems: list[Problem] = list(listing.problems)
        self.notes: list[str] = list(listing.notes)
        self.duplicates, self.has_rows = list(listing.duplicates), listing.has_rows
        self.tables = list(listing.tables)
        self.records: list[Record] = []
        self.without_caption: list[str] = []
        self.looked_at = len(listing.entries) + len(listing.problems)
        self._root = listing.root
        self._entries: dict[str, Entry] = {}

    def __len__(self) -> int:
        """Records."""
        return len(self.records)

    def read(self, record: Record, column: str | None = None) -> bytes:
        """See ``ImageSource``."""
        if column is not None:
            return read_blob(self._blob_of(record, column))
        picture = self._entries[record.key].picture
        if picture is None:
            raise UserError(f"{record.key} of {self.name} has features and no picture; use features()")
        return read_blob(picture)

    def stamp(self, record: Record, column: str) -> str:
        """Changes when the file does that a column names; empty where that can't be read."""
        return stamp_of(self._blob_of(record, column))

    def _blob_of(self, record: Record, column: str) -> Blob:
        """The file that a column names."""
        entry = self._entries[record.key]
        if column in entry.pictures:
            return entry.pictures[column]
        value = record.columns.get(column)
        if not isinstance(value, str):
            held = f"holds {value!r}" if column in record.columns else "is not there"
            names = ", ".join(record.columns) or "none"
            raise UserError(
                f"column {column!r} of {record.key} {held}; it must name a picture's file: correct the data, or name "
                f"another column (there are: {names})"
            )
        return FileBlob(os.path.join(self._root, value), shown(value))

    def features(self, record: Record) -> Mapping[str, np.ndarray]:
        """See ``ImageSource``. An .npz gives its arrays by their names, an .npy one by the name of its file's kind."""
        found: dict[str, np.ndarray] = {}
        for name, blob in self._entries[record.key].arrays.items():
            try:
                content = np.load(io.BytesIO(read_blob(blob)), allow_pickle=False)
                found |= {name: content} if isinstance(content, np.ndarray) else dict(content.items())
            except BadPicture:
                raise
            except Exception as error:  # damaged files make numpy raise anything
                raise BadPicture(blob.name, f"holds no arrays ({reason_of(error, 100)})") from error
        return found

    def blob(self, record: Record) -> Blob:
        """Where a record's file lies, to be opened."""
        return self._entries[record.key].picture

    def name_of(self, record: Record) -> str:
        """The file's name, for messages."""
        picture = self._entries[record.key].picture
        return record.key if picture is None else picture.name

    def has_features(self, record: Record) -> bool:
        """Whether arrays are stored beside the picture."""
        return bool(self._entries[record.key].arrays)

    def describe(self) -> str:
        """One line for the start of a run."""
        sizes = [record.size for record in self.records if record.size is not None]
        captions = sum(len(record.captions) for record in self.records)
        parts = [f"{self.name} ({self.kind}): {len(self)} {self.media.many if sizes else 'samples'}"]
        if sizes:
            small, large = (chosen(sizes, key=lambda size: size[0] * size[1]) for chosen in (min, max))
            parts.append(f"{small[0]}x{small[1]} to {large[0]}x{large[1]} px (height x width)")
        seconds = [record.video.seconds for record in self.records if record.video is not None]
        if seconds:
            parts.append(f"{min(seconds):.2f} to {max(seconds):.2f} s long")
        parts.append(f"{captions} captions")
        if self.problems:
            parts.append(f"{len(self.problems)} unusable files left out")
        return ", ".join(parts)


def open_source(config: ImageDataConfig, say: Say = print) -> IndexedSource:
    """Finds out the format of ``config.path`` and indexes it, for training.

    Says in one line each: what was found, every file that can't be used, and a count of everything that is left out or
    done to pictures.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UserError: no pictures, captions or scores missing where they are needed, or too many unusable files.
    """
    source = index_source(config)
    for note in source.notes:
        say(f"data: {note}")
    refuse_too_many_bad(source.problems, source.looked_at, config.max_bad_share)
    for problem in source.problems:
        say(f"data: left out: {problem.name} {problem.reason}")
    refuse_no_pictures(source)
    refuse_missing_captions(source, config)
    if note := check_scores((record.captions for record in source.records), config):
        say(f"data: {note}")
    say(f"data: {source.describe()}")
    return source


def index_source(config: ImageDataConfig) -> IndexedSource:
    """Finds out the format of ``config.path`` and indexes it, whatever is found there.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UserError: it is of no known format, or damaged as a whole.
    """
    media = CLIPS if isinstance(config, VideoDataConfig) else PICTURES
    if config.path is None or not config.path.strip():
        raise UserError(
            f"--data.path is missing; name a folder of {media.many}, a manifest, tar files or a dataset on disk"
        )
    path = pathlib.Path(config.path).expanduser()
    try:
        if not path.exists():
            raise FileNotFoundError(
                f"--data.path {path} does not exist; name a folder of {media.many}, a manifest or a tar"
            )
        listing = list_samples(path, config, media)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"--data.path {path} can't be read ({error.strerror}); allow it, or name another") from error
    source = IndexedSource(config.path, listing, media)
    look = _look
    if isinstance(config, VideoDataConfig):
        look = functools.partial(_look_at_video, source_fps=config.source_fps)
    usable = _large_enough(_read_headers(listing, source, look), config, source)
    records = [(entry, _record(entry, looked, config)) for entry, looked in usable]
    if isinstance(config, VideoDataConfig):
        records = _within_limits(records, config, source)
    records = _with_captions(records, config, source)
    if isinstance(config, VideoDataConfig):
        records = with_motion_scores(records, config.motion_score)
    records = _with_groups(records, config, source)
    source.records = [record for _, record in records]
    source._entries = {entry.key: entry for entry, _ in records}
    return source


def refuse_too_many_bad(problems: Sequence[Problem], total: int, limit: float) -> None:
    """Stops where more than a share of the files is unusable.

    Args:
        problems: each unusable file once.
        total: files that were looked at, the unusable ones included.
        limit: ``max_bad_share``.

    Raises:
        UserError: more than the limit.
    """
    if len(problems) > limit * total:
        some = "; ".join(f"{problem.name} {problem.reason}" for problem in problems[:_LISTED])
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise UserError(
            f"{len(problems)} of {total} files are unusable, --data.max-bad-share allows a share of {limit:g}: "
            f"{some}{more}: mend or remove them, or raise it (python -m train.inspect_data PATH lists them all, with "
            "--conditions those of conditions too)"
        )


def refuse_no_pictures(source: IndexedSource) -> None:
    """Stops where there is nothing to train on.

    Raises:
        UserError: no records.
    """
    if not source.records:
        left_out = f"; {source.notes[-1]}" if source.notes else ""
        step = f"name a folder with {', '.join(source.media.suffixes[:6])} files, a manifest or a tar"
        if source.problems:
            first = source.problems[0]
            step = f"mend them, or name another place: {first.name} {first.reason}"
        raise UserError(
            f"--data.path {source.name} ({source.kind}) has no {source.media.one} that can be used, "
            f"{len(source.problems)} files are unusable{left_out}: {step}"
        )


def refuse_missing_captions(source: IndexedSource, config: ImageDataConfig) -> None:
    """Stops where captions are missing and that is an error.

    Raises:
        UserError: with the first names.
    """
    missing = source.without_caption
    if not missing or config.missing_captions != "error":
        return
    names = ", ".join(missing[:_LISTED]) + (", ..." if len(missing) > _LISTED else "")
    example, advice = "a photo of ...", "write one beside each (a.txt for a.jpg)"
    if source.has_rows:
        columns = list(dict.fromkeys(name for record in source.records for name in record.columns))
        there = f"further columns are {', '.join(columns)}" if columns else "there are no further columns"
        advice = f"they are read from columns called {', '.join(CAPTION_COLUMNS)} ({there}): fill in or rename one"
        example = _column_of_words(source.records) or example
    elif source.media is CLIPS:
        advice = "write one beside each (a.txt for a.mp4)"
    if source.tables:
        advice = f"name {shown(str(source.tables[0]))} as --data.path, if it has them, {advice}"
    raise UserError(
        f"{len(missing)} of {len(source)} {source.media.many} have no caption: {names}; {advice}, give all of them one "
        f"with --data.caption {example!r}, or choose --data.missing-captions skip or empty"
    )


def _column_of_words(records: Sequence[Record]) -> str | None:
    """The column with the longest texts, in braces: it may well be a caption. None where no text has two words."""
    lengths: collections.Counter[str] = collections.Counter()
    for record in records:
        for name, value in record.columns.items():
            lengths[name] += len(value.split()) - 1 if isinstance(value, str) else 0
    return next((f"{{{name}}}" for name, count in lengths.most_common(1) if count), None)


# -- headers, captions, groups -----------------------------------------------------------------------------------------


class _Looked(NamedTuple):
    header: Header | ClipHeader
    stamp: str


_NO_PICTURE = Header(0, 0, "", ())


def _look(entry: Entry) -> _Looked | BadPicture:
    """A picture's header; ``_NO_PICTURE`` for features alone."""
    if entry.picture is None:
        return _looked_at_features(entry)
    try:
        with entry.picture.open() as file:
            header = read_header(file, name=entry.picture.name)
            return _Looked(header, stamp(file))
    except BadPicture as error:
        return error
    except OSError as error:
        return BadPicture(entry.picture.name, f"can't be read ({error.strerror})")


def _look_at_video(entry: Entry, source_fps: float | None) -> _Looked | BadPicture:
    """A video's header."""
    from train.data.video.containers import open_clip

    if entry.picture is None:
        return BadPicture(entry.key, "has features and no video")
    try:
        with open_clip(entry.picture, source_fps) as clip, entry.picture.open() as file:
            frames = getattr(entry.picture, "frames", ())
            others = [(name, stamp_of(entry.picture.frame(number))) for number, name in enumerate(frames)]
            return _Looked(clip.header, stamp(file, str(others) if others else ""))
    except BadPicture as error:
        return error
    except OSError as error:
        return BadPicture(entry.picture.name, f"can't be read ({error.strerror})")


def _looked_at_features(entry: Entry) -> _Looked:
    """What is known of a sample that has features and no picture."""
    stamps = [f"{name} {stamp_of(blob)}" for name, blob in sorted(entry.arrays.items())]
    return _Looked(_NO_PICTURE, " ".join(stamps))


def _read_headers(
    listing: Listing, source: IndexedSource, look: Callable[[Entry], _Looked | BadPicture]
) -> list[tuple[Entry, _Looked]]:
    """Entries whose picture can be opened; the others become problems."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(look, listing.entries))
    usable, oddities, misnamed, misstated = [], collections.defaultdict(list), [], []
    for entry, looked in zip(listing.entries, found):
        if isinstance(looked, BadPicture):
            source.problems.append(Problem(looked.name, looked.reason))
            continue
        usable.append((entry, looked))
        header = looked.header
        if looked.header is _NO_PICTURE:
            continue
        for oddity in header.oddities:
            oddities[oddity].append(entry.picture.name)
        pictured = isinstance(header, Header) and isinstance(entry.picture, FileBlob)
        if pictured and not _named_right(entry.picture.path, header.format):
            misnamed.append(f"{entry.picture.name} is {header.format}")
        if entry.stated is not None and entry.stated != (header.height, header.width):
            misstated.append(entry.picture.name)
    many = source.media.many
    for oddity, names in oddities.items():
        source.notes.append(_counted(names, f"{many} are {oddity}"))
    if misnamed:
        source.notes.append(_counted(misnamed, "pictures are of another format than their name says, and are read"))
    if misstated:
        source.notes.append(_counted(misstated, f"{many} have another size than the data states; their own counts"))
    return usable


_SUFFIX_OF_FORMAT = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
}


def _named_right(path: str, picture_format: str) -> bool:
    return os.path.splitext(path)[1].lower() in _SUFFIX_OF_FORMAT.get(picture_format, ())


def _counted(names: Sequence[str], text: str, first: int = 3) -> str:
    return f"{len(names)} {text}: {', '.join(names[:first])}{', ...' if len(names) > first else ''}"


def _large_enough(
    usable: list[tuple[Entry, _Looked]], config: ImageDataConfig, source: IndexedSource
) -> list[tuple[Entry, _Looked]]:
    small = [
        entry.key
        for entry, looked in usable
        if looked.header is not _NO_PICTURE and min(looked.header.height, looked.header.width) < config.minimum_size
    ]
    if small:
        source.notes.append(
            _counted(
                small,
                f"{source.media.many} have a side below --data.minimum-size {config.minimum_size} and are left out",
            )
        )
    left_out = set(small)
    return [(entry, looked) for entry, looked in usable if entry.key not in left_out]


def _record(entry: Entry, looked: _Looked, config: ImageDataConfig) -> Record:
    column = "group" if config.group_column is None else config.group_column
    group = entry.columns.get(column)
    if config.group_column == "folder" and group is None:
        group = entry.folder
    if group is None and config.group_column is not None:
        raise UserError(
            f"--data.group-column {column}: {entry.key} has none; it has the columns "
            f"{', '.join(entry.columns) or 'none'}: name a column that every one has, or folder"
        )
    size = None if looked.header is _NO_PICTURE else (looked.header.height, looked.header.width)
    group = None if group is None else str(group)
    video = None if isinstance(looked.header, Header) else looked.header
    return Record(entry.key, size, entry.captions, group, entry.columns, looked.stamp, video)


def _within_limits(
    records: list[tuple[Entry, Record]], config: VideoDataConfig, source: IndexedSource
) -> list[tuple[Entry, Record]]:
    """Records whose scores are within ``filters``; those without such a score become problems."""
    limits, kept, others = config.score_limits(), [], []
    for entry, record in records:
        try:
            (kept if passes(record.key, record.columns, limits) else others).append((entry, record))
        except BadPicture as error:
            source.problems.append(Problem(error.name, error.reason))
    if others:
        names = [record.key for _, record in others]
        source.notes.append(_counted(names, f"{source.media.many} do not pass --data.filters and are left out"))
    return kept


def _with_captions(
    records: list[tuple[Entry, Record]], config: ImageDataConfig, source: IndexedSource
) -> list[tuple[Entry, Record]]:
    """Records with the captions that training will see; keys of those without are in ``source.without_caption``."""
    done = []
    replaced = 0
    template = config.caption
    uses_own = template is None or "{caption}" in template
    for entry, record in records:
        captions = record.captions
        if not uses_own:
            replaced += bool(captions)
            captions = (Caption(fill_caption(template, record.columns)),)
        elif template is not None:
            captions = tuple(each._replace(text=fill_caption(template, record.columns, each.text)) for each in captions)
        if not captions:
            source.without_caption.append(record.key)
            if config.missing_captions == "skip":
                continue
            captions = (Caption(""),) if config.missing_captions == "empty" else ()
        done.append((entry, dataclasses.replace(record, captions=captions)))
    many = source.media.many
    if replaced:
        source.notes.append(f"{replaced} {many} have captions of their own, which --data.caption replaces")
    missing = source.without_caption
    if missing and config.missing_captions == "skip":
        source.notes.append(_counted(missing, f"{many} without a caption are left out", _LISTED))
    elif missing and config.missing_captions == "empty":
        source.notes.append(_counted(missing, f"{many} without a caption get an empty one", _LISTED))
    return done


def _with_groups(
    records: list[tuple[Entry, Record]], config: ImageDataConfig, source: IndexedSource
) -> list[tuple[Entry, Record]]:
    """Records of which those of one picture, as where it has a line per caption, are of one group.

    A picture is known by its stamp, whatever the names of its samples are; pictures that come once stay as they are.
    """
    counts = collections.Counter(record.stamp for _, record in records)
    groups = {record.stamp: record.group for _, record in records if record.group is not None}
    done, named = [], []
    for entry, record in records:
        if record.group is None and record.stamp and counts[record.stamp] > 1:
            record = dataclasses.replace(record, group=groups.get(record.stamp, f"picture {record.stamp}"))
            named.append(record.key)
        done.append((entry, record))
    if named:
        kept = ", and a split keeps them together" if config.validation_share else ""
        source.notes.append(_counted(named, f"samples share their {source.media.one} with others{kept}"))
    return done
