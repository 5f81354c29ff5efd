"""Folders whose pictures are the frames of one video."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from sana_jax.files import natural_order
from train.data.sources.listing import PICTURE_SUFFIXES, Blob, FileBlob, Listing, Media, shown

_FEWEST = 2  # pictures


@dataclass(frozen=True, slots=True)
class FramesBlob:
    """A folder of pictures that are a video's frames, in the order of their names, numbers counted as numbers."""

    path: str
    name: str
    frames: tuple[str, ...]

    def open(self) -> IO[bytes]:
        """Its first frame.

        Raises:
            BadPicture: it can't be read.
        """
        return self.frame(0).open()

    def frame(self, number: int) -> FileBlob:
        """A frame's file."""
        name = self.frames[number]
        return FileBlob(os.path.join(self.path, name), f"{self.name}/{shown(name)}")


def is_folder(path: str) -> bool:
    """Whether a path is a folder; False for what can't be looked at."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def list_frames(path: str, name: str) -> Blob:
    """The frames in a folder; where there are none, a blob that can't be opened."""
    try:
        frames = frames_in_order(os.listdir(path))
    except OSError:
        frames = ()
    return FramesBlob(path, name, frames) if len(frames) >= _FEWEST else FileBlob(path, name)


def take_frame_folders(listing: Listing, files: Sequence[str], media: Media) -> tuple[list[str], dict[str, Blob]]:
    """Separates folders of frames from other files.

    A folder below the root with two pictures or more and no video of its own is one. Pictures elsewhere are left out,
    with a line.

    Args:
        listing: notes go there.
        files: relative names.
        media: what videos are.

    Returns:
        The other files; the folders of frames by their relative names.
    """
    names: dict[str, list[str]] = {}
    with_videos = set()
    for relative in files:
        folder, base = os.path.split(relative)
        suffix = os.path.splitext(base)[1].lower()
        if suffix in media.suffixes:
            with_videos.add(folder)
        elif suffix in PICTURE_SUFFIXES:
            names.setdefault(folder, []).append(base)
    found: dict[str, Blob] = {}
    lonely: list[str] = []
    for folder, own in names.items():
        if folder and folder not in with_videos and len(own) >= _FEWEST:
            path = os.path.join(listing.root, folder)
            found[folder] = FramesBlob(path, shown(folder), frames_in_order(own))
        else:
            lonely += [os.path.join(folder, base) for base in own]
    listing.note(lonely, "pictures are neither videos nor in a folder of frames alone, and are left out")
    pictures = {os.path.join(folder, base) for folder, own in names.items() for base in own}
    return [relative for relative in files if relative not in pictures], found


def frames_in_order(names: Sequence[str]) -> tuple[str, ...]:
    """Names of pictures in the order in which they are frames: numbers in names are counted as numbers."""
    found = [name for name in names if os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES if name[:1] != "."]
    return tuple(sorted(found, key=natural_order))
