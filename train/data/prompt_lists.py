"""Lists of prompts: a text file, a manifest, or the captions of a directory that holds some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sana_jax.errors import UserError
from train.data.cache import IDENTITY_FILE, CacheReader
from train.data.sources.listing import Listing, clean_text, read_text
from train.data.sources.manifest import SUFFIXES, read_rows
from train.data.sources.rows import CAPTION_COLUMNS, picture_column, sort_out

_LISTED = 3  # names in a message
_ALLOWED = "a text file with one prompt per line, a manifest (jsonl, csv) with captions, or a directory of trajectories"


def read_prompts(path: str, option: str, say: Callable[[str], None] = print) -> list[str]:
    """The distinct prompts of a file, in its order: lines of a text, captions of a manifest, or those of a directory
    of trajectories or of another cache.

    Says how many lines are empty and how many prompts come more than once.

    Args:
        path: of the file or directory.
        option: that names it, for messages.
        say: prints a line.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UserError: it can't be read, has rows without a caption, or no prompts.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"{option} {path} does not exist; name {_ALLOWED}")
    if place.is_dir():
        if not (place / IDENTITY_FILE).is_file():
            raise UserError(f"{option} {path} is a directory without prompts; name {_ALLOWED}")
        found = [caption[0] for sample in CacheReader(place).samples() for caption in sample["captions"]]
    elif place.suffix.lower() in SUFFIXES:
        found = _captions(place, option, say)
    else:
        found = _lines(place, option)
    prompts = list(filter(None, map(clean_text, found)))
    distinct = list(dict.fromkeys(prompts))
    if not distinct:
        raise UserError(f"{option} {path} has no prompts; write one per line")
    if empty := len(found) - len(prompts):
        say(f"data: {path}: {empty} empty lines are left out")
    if not place.is_dir() and (repeated := len(prompts) - len(distinct)):
        say(f"data: {path}: {repeated} prompts that come more than once are taken once")
    return distinct


def _lines(path: Path, option: str) -> list[str]:
    try:
        text, _ = read_text(path.read_bytes())
    except OSError as error:
        raise UserError(f"{option} {path} can't be read ({error.strerror}); allow it, or name another") from error
    if "\0" in text:
        raise UserError(f"{option} {path} is no text; name {_ALLOWED}")
    return text.splitlines()


def _captions(path: Path, option: str, say: Callable[[str], None]) -> list[str]:
    listing = Listing(f"manifest {path.name}", path.parent)
    rows = read_rows(path, listing)
    picture = picture_column(list(dict.fromkeys(name for _, row in rows for name in row)))
    sorted_out = [(where, sort_out(row, picture).captions) for where, row in rows]
    problems = [f"{problem.name} {problem.reason}" for problem in listing.problems]
    problems += [f"{where} has no caption" for where, captions in sorted_out if not captions]
    for note in listing.notes:
        say(f"data: {note}")
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise UserError(
            f"{option} {path}: {'; '.join(problems[:_LISTED])}{more}; mend these rows: a caption is in a column called "
            f"{', '.join(CAPTION_COLUMNS[:3])} or the like"
        )
    return [caption.text for _, captions in sorted_out for caption in captions]
