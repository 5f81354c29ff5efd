"""Tar files of samples (WebDataset): members that share a name up to the first dot belong together.

The members' places are read once, so that any of them can be read at any time. Captions and CLIP scores may lie in
further files beside a tar, ``<tar's stem><suffix>.json``, by the samples' names. A ``wids-meta.json`` lists tars.
"""

from __future__ import annotations

import os
import pathlib
import tarfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sana_jax.errors import UserError
from sana_jax.files import read_json
from train.data.decoding import BadPicture
from train.data.records import Caption, shown
from train.data.sources.folder import hidden, note_encodings, parse_sidecar, read_caption_file
from train.data.sources.listing import (
    ARRAY_SUFFIXES,
    CAPTION_SUFFIXES,
    PICTURES,
    Entry,
    Listing,
    Media,
    SliceBlob,
    clean_key,
    clean_text,
    read_text,
    unique_keys,
)
from train.data.sources.rows import as_number, without_repeats

LIST_OF_TARS = "wids-meta.json"


def list_tars(path: pathlib.Path, kinds: Collection[str] = (), media: Media = PICTURES) -> Listing:
    """The samples of a tar, of the tars below a folder, or of those that a ``wids-meta.json`` lists.

    Raises:
        UserError: no tar below a folder, a compressed tar, or a list of tars that is none.
    """
    if path.is_dir() and (path / LIST_OF_TARS).is_file():
        path = path / LIST_OF_TARS
    listing = Listing("tar file", path.parent)
    if path.name.endswith(".json"):
        shards = dict(_listed(listing, path))
        listing.kind = f"{len(shards)} tar files listed by {path.name}"
    elif path.is_dir():
        listing.root = path
        tars = sorted(each for each in path.rglob("*.tar") if not hidden(each.name))
        if not tars:
            raise UserError(f"--data.format webdataset: no .tar below {path}; name a folder with some, or leave it out")
        shards = dict.fromkeys(tars)
        listing.kind = f"{len(shards)} tar files"
    else:
        shards = {path: None}
    encodings: dict[str, list[str]] = {}
    for shard, expected in shards.items():
        first = len(listing.entries)
        _add_shard(listing, shard, list(shards), kinds, encodings, media)
        found = len(listing.entries) - first
        if expected is not None and expected != found:
            listing.notes.append(f"{shard.name} has {found} samples, {LIST_OF_TARS} says {expected}")
    note_encodings(listing, encodings)
    unique_keys(listing)
    return listing


def _listed(listing: Listing, path: pathlib.Path) -> Iterator[tuple[pathlib.Path, int | None]]:
    shards = read_json(path).get("shardlist")
    if not isinstance(shards, list) or not all(isinstance(each, dict) and "url" in each for each in shards):
        raise UserError(f"{path} has no shardlist of objects with a url; name a folder of tar files instead")
    for each in shards:
        shard = path.parent / str(each["url"]).removeprefix("file:")
        if shard.is_file():
            yield shard, each.get("nsamples")
        else:
            listing.problem(str(each["url"]), f"is missing, though {path.name} lists it")


def _add_shard(
    listing: Listing,
    shard: pathlib.Path,
    shards: list[pathlib.Path],
    kinds: Collection[str],
    encodings: dict[str, list[str]],
    media: Media,
) -> None:
    texts, scores = _external(listing, shard, shards)
    kinds = {*kinds, *(kind for kind, _ in (item for each in scores.values() for item in each))}
    stem = clean_key(os.path.splitext(os.path.relpath(shard, listing.root))[0])
    for name, members in _samples(listing, shard).items():
        captions: list[Caption] = []
        pictures: dict[str, SliceBlob] = {}
        columns: dict[str, Any] = {}
        arrays: dict[str, SliceBlob] = {}
        picture = stated = None
        for suffix, blob in sorted(members.items()):
            first, dot, last = suffix.rpartition(".")
            if f".{last}" in media.suffixes:
                if dot:
                    pictures[first] = blob
                    columns[first] = suffix
                elif picture is None:
                    picture = blob
                else:
                    listing.duplicates.append((picture.name, blob.name))
            elif f".{last}" in CAPTION_SUFFIXES:
                caption = read_caption_file(listing, blob, first or {"txt": "prompt"}.get(last, last), encodings)
                captions += [caption] if caption else []
            elif last == "json" and not dot:
                if (row := parse_sidecar(listing, blob, kinds)) is not None:
                    captions += row.captions
                    columns |= row.columns
                    stated = row.size
            elif f".{last}" in ARRAY_SUFFIXES:
                arrays[first or last] = blob
            elif last in ("cls", "id", "index"):
                text = clean_text(read_text(_bytes(listing, blob))[0])
                number = as_number(text)
                columns[last] = text if number is None else int(number) if number == int(number) else number
            else:
                columns.setdefault(suffix, suffix)
                pictures[suffix] = blob
        captions = [*without_repeats(captions, kinds), *texts.get(name, [])]
        if picture is None and not arrays:
            listing.problem(f"{shown(shard.name)}/{shown(name)}", f"has no {media.one}")
            continue
        captions = _with_scores(captions, scores.get(name, []))
        key = f"{stem}/{clean_key(name)}"
        listing.entries.append(Entry(key, picture, tuple(captions), columns, pictures, arrays, stem, stated))


def _bytes(listing: Listing, blob: SliceBlob) -> bytes:
    try:
        with blob.open() as file:
            return file.read()
    except BadPicture as error:
        listing.problem(error.name, error.reason)
        return b""


def _with_scores(captions: list[Caption], scores: list[tuple[str, float]]) -> list[Caption]:
    """Captions in the order of their scores' files; one that has several scores comes several times."""
    if not scores:
        return captions
    by_kind = {caption.kind: caption for caption in reversed(captions)}
    scored = [by_kind[kind]._replace(score=score) for kind, score in scores if kind in by_kind]
    kinds = {caption.kind for caption in scored}
    return scored + [caption for caption in captions if caption.kind not in kinds]


def _samples(listing: Listing, shard: pathlib.Path) -> dict[str, dict[str, SliceBlob]]:
    """Members by sample, then by suffix in lower case."""
    samples: dict[str, dict[str, SliceBlob]] = {}
    repeated, ignored, end = [], [], 0
    size = os.path.getsize(shard)
    try:
        with open(shard, "rb") as file:
            if file.read(2) == b"\x1f\x8b" or file.seek(0) or file.read(3) == b"BZh":
                raise UserError(f"{shard} is compressed, which forbids reading samples in any order: unpack it first")
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                tar.members = []  # it would keep every one
                end = max(end, member.offset_data + -(-member.size // 512) * 512)
                folder, _, base = member.name.rpartition("/")
                if not member.isreg() or hidden(base) or any(hidden(part) for part in folder.split("/") if part != "."):
                    ignored += [] if member.isdir() else [f"{shard.name}/{member.name}"]
                    continue
                first, dot, suffix = base.partition(".")
                name = f"{folder}/{first}".removeprefix("./") if folder else first
                shown_name = f"{shown(shard.name)}/{shown(member.name)}"
                if not dot:
                    ignored.append(f"{shard.name}/{member.name}")
                elif member.offset_data + member.size > size:
                    listing.problem(shown_name, "is cut off by the end of the tar")
                elif suffix.lower() in samples.setdefault(name, {}):
                    repeated.append(f"{shard.name}/{member.name}")
                else:
                    blob = SliceBlob(str(shard), member.offset_data, member.size, shown_name)
                    samples[name][suffix.lower()] = blob
        if samples and (ending := _ending(shard, end)) is not None:
            listing.problem(shard.name, f"{ending} after {len(samples)} samples")
    except tarfile.TarError as error:
        listing.problem(shard.name, f"is damaged as a tar after {len(samples)} samples ({error})")
    except OSError as error:
        listing.problem(shard.name, f"can't be read ({error.strerror or error})")
    listing.note(repeated, "members are in a tar twice; the first is taken")
    listing.note(ignored, "members are hidden, links, or without a suffix, and left out")
    return {name: members for name, members in samples.items() if members}


def _ending(shard: pathlib.Path, end: int) -> str | None:
    """What is wrong with the end of a tar, which is zeros: tarfile takes anything else for an end too."""
    with open(shard, "rb") as file:
        file.seek(end)
        rest = file.read(1 << 16)
    if not rest:
        return "is cut off"
    return "goes on with something that is no tar, or with another tar," if any(rest) else None


Texts = dict[str, list[Caption]]
Scores = dict[str, list[tuple[str, float]]]


def _external(listing: Listing, shard: pathlib.Path, shards: list[pathlib.Path]) -> tuple[Texts, Scores]:
    """Captions and scores by sample, of the JSON files whose names go on from the tar's."""
    texts: Texts = {}
    scores: Scores = {}
    used = []
    for path in sorted(shard.parent.glob("*.json")):
        owners = [each for each in shards if each.parent == path.parent and path.stem.startswith(each.stem)]
        if path.name == LIST_OF_TARS or not owners or max(owners, key=lambda each: len(each.stem)) != shard:
            continue
        try:
            content = read_json(path)
        except UserError as error:
            listing.problem(path.name, f"can't be used ({error})")
            continue
        used.append(path.name)
        suffix = path.stem.removeprefix(shard.stem).strip("_-.") or "prompt"
        for name, value in content.items():
            items: Mapping[str, Any] = value if isinstance(value, dict) else {suffix: value}
            for kind, each in items.items():
                number = as_number(each)
                if number is not None:
                    scores.setdefault(name, []).append((kind if isinstance(value, dict) else "prompt", number))
                elif isinstance(each, str) and clean_text(each):
                    texts.setdefault(name, []).append(Caption(clean_text(each), kind))
    listing.note(used, f"files of captions or scores beside {shard.name}")
    return texts, scores
