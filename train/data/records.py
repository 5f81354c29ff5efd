"""What a data set is made of, whatever its format: records, captions, and the files that can't be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from train.data.video.containers import ClipHeader

Say = Callable[[str], None]


class Caption(NamedTuple):
    """A caption of a picture.

    Attributes:
        text: the caption.
        kind: who or what wrote it: ``prompt``, or the name that the data gives it.
        score: how well it fits the picture by CLIP, 0 to 100, where the data says.
    """

    text: str
    kind: str = "prompt"
    score: float | None = None


class Problem(NamedTuple):
    """A file that can't be used, and why, as in "is empty"."""

    name: str
    reason: str


@dataclass(frozen=True)
class Record:
    """A picture, or a video, with what belongs to it.

    Attributes:
        key: unique in the source and the same on every machine: the relative path without suffix, or the tar's stem
            and the sample's.
        size: (height, width) as shown, after the rotation that the file asks for; None for features without a picture.
        captions: empty where it has none.
        group: pictures of one group never fall on both sides of a split; None: a group by itself.
        columns: everything else that the data says of it; numbers are numbers, names of further pictures are texts.
        stamp: changes when the file does that is encoded, and is the same on every machine.
        video: what a video says of itself; None for pictures.
    """

    key: str
    size: tuple[int, int] | None
    captions: tuple[Caption, ...] = ()
    group: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    stamp: str = ""
    video: ClipHeader | None = None


def shown(name: str) -> str:
    """A file's name as one printable line."""
    if name.isprintable():
        return name
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in name
    )
