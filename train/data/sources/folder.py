"""A folder of pictures, of any depth, ``x.jpg`` with ``x.txt`` beside it; or those that a ``meta_data.json`` names.

A caption may have the picture's whole name too, ``x.jpg.txt``, where there is no ``x.txt``.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from sana_jax.errors import UserError
from sana_jax.files import read_json
from train.data.decoding import BadPicture
from train.data.records import Caption, shown
from train.data.sources.frame_folders import take_frame_folders
from train.data.sources.listing import (
    ARRAY_SUFFIXES,
    CAPTION_SUFFIXES,
    PICTURE_SUFFIXES,
    PICTURES,
    TABLE_SUFFIXES,
    Blob,
    Entry,
    FileBlob,
    Listing,
    Media,
    clean_key,
    clean_text,
    read_blob,
    read_text,
)
from train.data.sources.rows import sort_out, without_repeats

_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
_SYSTEM_FILES = ("Thumbs.db", "thumbs.db", "desktop.ini", "Desktop.ini")
MANIFEST_OF_NAMES = "meta_data.json"


def list_folder(
    root: pathlib.Path, kinds: Collection[str] = (), media: Media = PICTURES, *, features: bool = False
) -> Listing:
    """Every picture, or video, below a folder.

    Args:
        root: the folder.
        kinds: names in a same-name .json file that are captions, beside the usual ones.
        media: what is looked for.
        features: whether .npz and .npy files without a picture are samples too.
    """
    listing = Listing("folder of features" if features else f"folder of {media.many}", root)
    files = _walk(listing, root, media)
    frames: dict[str, Blob] = {}
    if media.folders:
        files, frames = take_frame_folders(listing, files, media)
    _by_name(listing, files, kinds, media, features, frames)
    return listing


def list_named(path: pathlib.Path, kinds: Collection[str] = ()) -> Listing:
    """The pictures that a ``meta_data.json`` names, of the folder in which it lies.

    Raises:
        UserError: it names none.
    """
    names = read_json(path).get("img_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{path} has no list of texts img_names; allowed is an object like {{'img_names': ['a', 'b']}}: "
            "correct it, or choose --format folder, which needs no such file"
        )
    listing = Listing(f"pictures named by {path.name}", path.parent)
    files = _walk(listing, path.parent, PICTURES)
    wanted = {clean_key(name) for name in names}
    stems = {clean_key(_stem(relative)) for relative in files} | {clean_key(relative) for relative in files}
    chosen = [relative for relative in files if {clean_key(_stem(relative)), clean_key(relative)} & wanted]
    pictures = [relative for relative in files if _suffix(relative) in PICTURE_SUFFIXES]
    unnamed = [relative for relative in pictures if relative not in set(chosen)]
    listing.note(unnamed, f"pictures are not named by {path.name} and left out")
    # captions lie beside the pictures whether or not the names have suffixes
    stems_chosen = {clean_key(name) for relative in chosen for name in (relative, _stem(relative))}
    chosen = [each for each in files if each in set(chosen) or _beside(each, stems_chosen)]
    for name in names:
        if clean_key(name) not in stems:
            listing.problem(name, f"is missing, though {path.name} names it")
    _by_name(listing, chosen, kinds, PICTURES)
    return listing


def _beside(relative: str, stems: Collection[str]) -> bool:
    return _suffix(relative) in (*CAPTION_SUFFIXES, ".json", *ARRAY_SUFFIXES) and clean_key(_stem(relative)) in stems


def read_caption_file(listing: Listing, blob: FileBlob, kind: str, encodings: dict[str, list[str]]) -> Caption | None:
    """The caption in a text file, or None where it is empty or can't be read, which is then a problem.

    Files that are not UTF-8 are added to ``encodings``.
    """
    try:
        text, encoding = read_text(read_blob(blob))
    except BadPicture as error:
        listing.problem(blob.name, error.reason)
        return None
    if encoding != "UTF-8":
        encodings.setdefault(encoding, []).append(blob.name)
    text = clean_text(text)
    return Caption(text, kind) if text else None


def note_encodings(listing: Listing, encodings: Mapping[str, list[str]]) -> None:
    """Says which captions are not UTF-8."""
    for encoding, names in encodings.items():
        listing.note(names, f"texts are not UTF-8 and read as {encoding}")


def _by_name(
    listing: Listing,
    files: list[str],
    kinds: Collection[str],
    media: Media,
    features: bool = False,
    frames: Mapping[str, Blob] = MappingProxyType({}),
) -> None:
    """Entries of pictures with what has the same name beside them; ``frames`` are folders that are samples."""
    pictures: dict[str, list[str]] = {}
    for folder in frames:
        pictures.setdefault(clean_key(folder), []).append(folder)
    beside: dict[str, dict[str, str]] = {}
    for relative in files:
        suffix, stem = _suffix(relative), clean_key(_stem(relative))
        if suffix in media.suffixes:
            pictures.setdefault(stem, []).append(relative)
        elif suffix in (*CAPTION_SUFFIXES, ".json", *ARRAY_SUFFIXES):
            beside.setdefault(stem, {})[suffix] = relative
    encodings: dict[str, list[str]] = {}
    own = _named_in_full(pictures, beside)
    for stem, same in pictures.items():
        if len(same) > 1:
            listing.duplicates.append(tuple(shown(each) for each in same))
        found = _beside_picture(listing, beside.get(stem, {}), kinds, encodings)
        for relative in same:
            key = clean_key(relative) if len(same) > 1 else stem
            blob = frames.get(relative) or FileBlob(os.path.join(listing.root, relative), shown(relative))
            about = found
            if relative in own:
                captions = _beside_picture(listing, own[relative], kinds, encodings)["captions"]
                about = found | {"captions": tuple(without_repeats([*captions, *found["captions"]], kinds))}
            listing.entries.append(_entry(blob, key, about))
    alone = {stem: others for stem, others in beside.items() if stem not in pictures}
    if features:
        samples = {stem: others for stem, others in alone.items() if any(each in ARRAY_SUFFIXES for each in others)}
        for stem, others in samples.items():
            found = _beside_picture(listing, others, kinds, encodings)
            listing.entries.append(_entry(None, stem, found))
        alone = {stem: others for stem, others in alone.items() if stem not in samples}
    for text, suffixes in (("captions", CAPTION_SUFFIXES), ("files of features", ARRAY_SUFFIXES)):
        lonely = [others[suffix] for others in alone.values() for suffix in suffixes if suffix in others]
        listing.note(lonely, f"{text} have no {media.one} of the same name and are left out")
    if listing.duplicates:
        some = "; ".join(" and ".join(same) for same in listing.duplicates[:3])
        listing.notes.append(
            f"{len(listing.duplicates)} names belong to several {media.many}, all are used, with one caption where "
            f"none has a whole name (a.png.txt): {some}"
        )
    note_encodings(listing, encodings)


def _named_in_full(pictures: Mapping[str, list[str]], beside: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Caption files such as ``a.png.txt``, by picture and suffix, where ``a.txt`` is not there; out of ``beside``."""
    taken: dict[str, dict[str, str]] = {}
    for stem, same in pictures.items():
        for relative in same:
            whole = clean_key(relative)
            if whole in pictures or whole not in beside:  # in pictures: those of a.png.png
                continue
            others = beside[whole]
            missing = [suffix for suffix in CAPTION_SUFFIXES if suffix in others.keys() - beside.get(stem, {}).keys()]
            if missing:
                taken[relative] = {suffix: others.pop(suffix) for suffix in missing}
    return taken


def _entry(blob: Blob | None, key: str, found: dict[str, Any]) -> Entry:
    return Entry(key, blob, folder=key.rpartition("/")[0], **found)


def _beside_picture(
    listing: Listing, others: Mapping[str, str], kinds: Collection[str], encodings: dict[str, list[str]]
) -> dict[str, Any]:
    blobs = {suffix: FileBlob(os.path.join(listing.root, each), shown(each)) for suffix, each in others.items()}
    captions: list[Caption] = []
    for suffix, kind in zip(CAPTION_SUFFIXES, ("prompt", "caption")):
        if suffix in blobs and (caption := read_caption_file(listing, blobs[suffix], kind, encodings)):
            captions.append(caption)
    found: dict[str, Any] = {}
    if ".json" in blobs:
        row = parse_sidecar(listing, blobs[".json"], kinds)
        if row is not None:
            captions += row.captions
            found = {"columns": row.columns, "stated": row.size}
    arrays = {suffix[1:]: blob for suffix, blob in blobs.items() if suffix in ARRAY_SUFFIXES}
    return {"captions": tuple(without_repeats(captions, kinds)), "arrays": arrays, **found}


def parse_sidecar(listing: Listing, blob: Any, kinds: Collection[str]):
    """The row in a sample's JSON file; None, and a problem, where there is none."""
    try:
        content = json.loads(read_text(read_blob(blob))[0])
    except BadPicture as error:
        listing.problem(blob.name, error.reason)
        return None
    except (ValueError, RecursionError) as error:
        listing.problem(blob.name, f"is not JSON ({str(error)[:60]})")
        return None
    if not isinstance(content, dict):
        listing.problem(blob.name, f"holds a {type(content).__name__} instead of a JSON object")
        return None
    return sort_out(content, None, kinds)


def _stem(relative: str) -> str:
    return relative[: len(relative) - len(_suffix(relative))]


def _suffix(relative: str) -> str:
    return os.path.splitext(os.path.basename(relative))[1].lower()


def hidden(name: str) -> bool:
    """Whether a file or folder is the system's and not the user's."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS or name in _SYSTEM_FILES


def _walk(listing: Listing, root: pathlib.Path, media: Media) -> list[str]:
    """Relative names of all files, sorted folder by folder; what is not looked at is noted."""
    files: list[str] = []
    left_out: dict[str, list[str]] = {"hidden": [], "twice": [], "unread": [], "other": []}
    visited: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        full = os.path.join(root, folder)
        try:
            status = os.stat(full)
            if (status.st_dev, status.st_ino) in visited:
                left_out["twice"].append(folder)
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(full) as found:
                children = sorted(found, key=lambda child: child.name)
        except OSError as error:
            listing.problem(folder or str(root), f"can't be read ({error.strerror})")
            continue
        below = []
        for child in children:
            relative = os.path.join(folder, child.name)
            if hidden(child.name):
                left_out["hidden"].append(relative)
            elif _is_folder(child):
                below.append(relative)
            else:
                files.append(relative)
                known = (*PICTURE_SUFFIXES, *media.suffixes, *CAPTION_SUFFIXES, ".json", *ARRAY_SUFFIXES)
                if (suffix := _suffix(relative)) in media.unread[0]:
                    left_out["unread"].append(relative)
                elif suffix not in known:
                    left_out["other"].append(relative)
                    listing.tables += [pathlib.Path(root, relative)] if suffix in TABLE_SUFFIXES else []
        waiting += reversed(below)
    listing.note(left_out["hidden"], "hidden or system files are left out")
    listing.note(left_out["twice"], "folders were met again through links and are read once")
    listing.note(left_out["unread"], f"{media.many} are of kinds that are not read ({media.unread[1]})")
    listing.note(left_out["other"], "other files are left out")
    return files


def _is_folder(child: os.DirEntry) -> bool:
    try:
        return child.is_dir()
    except OSError:  # a link to itself: as a file it will be a problem with a name
        return False
