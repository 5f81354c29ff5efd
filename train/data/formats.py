"""Which format a data set is of, and what that format finds there."""

from __future__ import annotations

import collections
import os
import pathlib
from collections.abc import Iterator

from configs.data import Format, ImageDataConfig
from sana_jax.errors import UserError
from train.data.sources.folder import MANIFEST_OF_NAMES, hidden, list_folder, list_named
from train.data.sources.huggingface import list_dataset
from train.data.sources.listing import (
    ARRAY_SUFFIXES,
    CLIPS,
    PICTURE_SUFFIXES,
    PICTURES,
    FileBlob,
    Listing,
    Media,
)
from train.data.sources.manifest import SUFFIXES, USUAL_STEMS, list_manifest
from train.data.sources.webdataset import LIST_OF_TARS, list_tars


def find_format(path: pathlib.Path, media: Media = PICTURES) -> Format:
    """The format of a path, by what is there.

    Raises:
        UserError: a file that is none of them, or loose pictures beside tar or parquet files.
    """
    if path.is_file():
        return _format_of_file(path)
    names = sorted(child.name for child in path.iterdir() if not hidden(child.name))
    if {"dataset_dict.json", "state.json"} & set(names) or any(name.endswith(".arrow") for name in names):
        return "huggingface"
    if LIST_OF_TARS in names or any(name.endswith(".tar") for name in names):
        _refuse_mixture(path, media)
        return "webdataset"
    if MANIFEST_OF_NAMES in names:
        return "upstream_folder"
    if _usual_manifest(path) is not None:
        return "manifest"
    suffixes = {os.path.splitext(name)[1].lower() for name in names_below(path)}
    if suffixes & {*PICTURE_SUFFIXES, *media.suffixes}:
        _refuse_mixture(path, media)
        return "folder"
    for suffix, found in ((".parquet", "huggingface"), (".tar", "webdataset")):
        if suffix in suffixes:
            return found
    return "features" if suffixes & set(ARRAY_SUFFIXES) else "folder"


def _refuse_mixture(path: pathlib.Path, media: Media) -> None:
    """Raises ``UserError`` for loose pictures beside tar or parquet files, either of which might be what is meant."""
    counts = collections.Counter(os.path.splitext(name)[1].lower() for name in names_below(path))
    loose = sum(counts[suffix] for suffix in {*PICTURE_SUFFIXES, *media.suffixes})
    others = [(".tar", "tar files", "webdataset")]
    if media is not CLIPS:  # parquet files have no videos, and may well describe those beside them
        others.append((".parquet", "parquet files", "huggingface"))
    for suffix, files, name in others:
        if loose and counts[suffix]:
            raise UserError(
                f"--data.path {path} has {counts[suffix]} {files} and {loose} {media.many} beside them, and one format "
                f"is read: choose --data.format {name} for the {files}, or --data.format folder for the {media.many}"
            )


def _format_of_file(path: pathlib.Path) -> Format:
    suffix = path.suffix.lower()
    if path.name == LIST_OF_TARS or path.name.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        return "webdataset"
    if path.name == MANIFEST_OF_NAMES:
        return "upstream_folder"
    if suffix in SUFFIXES:
        return "manifest"
    if suffix in (".parquet", ".arrow"):
        return "huggingface"
    raise UserError(
        f"--data.path {path} is a file of no known kind; allowed are {', '.join(SUFFIXES)}, .tar, .parquet, .arrow, "
        "and folders: name the folder that it lies in"
    )


def _usual_manifest(path: pathlib.Path) -> pathlib.Path | None:
    """A manifest of one of the usual names, in a folder or in its folder ``train``."""
    folders = (path, path / "train")
    names = [folder / f"{stem}{suffix}" for folder in folders for stem in USUAL_STEMS for suffix in SUFFIXES[:4]]
    return next((name for name in names if name.is_file()), None)


def names_below(path: pathlib.Path) -> Iterator[str]:
    """Names of all files below a folder, without their folders and without those of the system's."""
    return map(os.path.basename, paths_below(path))


def paths_below(path: pathlib.Path) -> Iterator[str]:
    """Paths of all files below a folder, without those of the system's."""
    for root, folders, files in os.walk(path, followlinks=False):
        folders[:] = sorted(folder for folder in folders if not hidden(folder))
        yield from (os.path.join(root, file) for file in sorted(files) if not hidden(file))


def list_samples(path: pathlib.Path, config: ImageDataConfig, media: Media) -> Listing:
    """What the format of a path finds there: the one that ``config.format`` names, or that ``find_format`` does.

    Raises:
        UserError: it is of another format than was said, damaged as a whole, or of two formats at once.
        OSError: it can't be read.
    """
    found = config.format if config.format != "auto" else find_format(path, media)
    kinds = tuple(config.weights())
    if media is CLIPS and found not in (allowed := ("folder", "manifest", "webdataset")):
        raise UserError(
            f"--data.path {path} is of the format {found}, which has no videos; allowed are {', '.join(allowed)}: name "
            "a folder of video files, or choose pictures"
        )
    if found in ("folder", "features"):
        if not path.is_dir():
            raise UserError(f"--data.format {found}: {path} is no folder; name one, or leave the format out")
        return list_folder(path, kinds, media, features=found == "features")
    if found == "upstream_folder":
        return list_named(path / MANIFEST_OF_NAMES if path.is_dir() else path, kinds)
    if found == "webdataset":
        return list_tars(path, kinds, media)
    if found == "huggingface":
        return list_dataset(path, kinds)
    if path.is_dir():
        manifest = _usual_manifest(path)
        if manifest is None:
            raise UserError(
                f"--data.format manifest: {path} has no metadata.jsonl or metadata.csv; name the file itself"
            )
        listing = list_manifest(manifest, kinds, media)
        if manifest.parent != path:
            listing.notes.append(f"{manifest.relative_to(path)} is read, and no other folder of {path}")
        _note_unnamed(listing, path, manifest, media)
        return listing
    return list_manifest(path, kinds, media)


def _note_unnamed(listing: Listing, path: pathlib.Path, manifest: pathlib.Path, media: Media) -> None:
    """Says how many pictures below a folder its manifest does not name, as samples or in another column."""
    named = {os.path.normpath(entry.picture.path) for entry in listing.entries if isinstance(entry.picture, FileBlob)}
    values = (value for entry in listing.entries for value in entry.columns.values() if isinstance(value, str))
    named |= {os.path.normpath(os.path.join(listing.root, value)) for value in values}
    found = (os.path.normpath(file) for file in paths_below(path))
    unnamed = [file for file in found if os.path.splitext(file)[1].lower() in media.suffixes and file not in named]
    names = [os.path.relpath(file, path) for file in unnamed]
    listing.note(names, f"{media.many} are not named by {manifest.name} and left out")
