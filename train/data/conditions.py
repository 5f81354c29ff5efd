"""Further inputs of a model, one array per picture: numbers, vectors, control pictures, edges.

``--data.conditions name=kind`` asks for one: ``name`` is a column of the data and the array's name in a batch, ``kind``
one of ``KINDS``, with an argument after a colon where the kind takes one. A new kind is a class with the methods of
``Condition`` and an entry in ``KINDS``.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from kernels.typing import Float, UInt8
from sana_jax.errors import UserError, reason_of
from train.data.decoding import BadPicture, Crop, decode_picture, flip, resize_and_crop_to
from train.data.source import ImageSource, Record

if TYPE_CHECKING:
    from sana_jax.image_encoders import SiglipImageEncoder

# The customary thresholds of 100 and 200 (of 255) on Sobel's gradient of the gray picture, after slight smoothing.
CANNY_SIGMA, CANNY_LOW, CANNY_HIGH = 1.0, 100 / 255, 200 / 255
# A step of about half the range from black to white is a full edge.
SOFT_SIGMA, SOFT_GAIN = 1.0, 4.0
# Pixels around an edge within which others join it, and around a middle line that its stroke takes.
SCRIBBLE_SIGMA, SCRIBBLE_JOINED, SCRIBBLE_STROKE = 2.0, 3, 1


class View(NamedTuple):
    """The part of a picture that a sample shows."""

    height: int
    width: int
    crop: Crop = "center"
    mirrored: bool = False

    def of(self, picture: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "h w C"]:
        """The picture scaled, cut and mirrored."""
        part = resize_and_crop_to(picture, self.height, self.width, self.crop)
        return flip(part) if self.mirrored else part


class Sample(NamedTuple):
    """One variant of a picture on its way into the cache."""

    source: ImageSource
    record: Record
    view: View
    picture: UInt8[np.ndarray, "h w C"] | None
    """The picture as ``view`` shows it; None where the data has latents instead."""


class Condition(Protocol):
    """What the cache asks of a kind.

    Attributes:
        name: of the column and of the array.
        identity: what the numbers are a function of, apart from the sample.
        of_one_shape: whether the array has the same shape for every sample, whatever the picture's size.
    """

    name: str
    identity: Mapping[str, Any]
    of_one_shape: bool

    def missing(self, record: Record) -> str | None:
        """Why a record has no such input, or None if it has one; without reading pictures."""
        ...

    def reads_file(self, record: Record) -> bool:
        """Whether its column names a file that is read, so that the input changes when the file does."""
        ...

    def width(self, source: ImageSource, record: Record) -> int | None:
        """Numbers of a vector, None for what is no vector.

        Raises:
            BadPicture: the record's can't be read.
        """
        ...

    def prepare(self, sample: Sample) -> np.ndarray:
        """What ``encode`` takes, without a batch axis; runs in threads, away from the accelerator.

        Raises:
            BadPicture: it can't be read.
        """
        ...

    def encode(self, prepared: np.ndarray) -> Float[np.ndarray, "B ..."]:
        """A batch of what ``prepare`` returns to the arrays that the model gets."""
        ...

    def free(self) -> None:
        """Lets go of weights of its own."""
        ...


@dataclass(frozen=True)
class Encoders:
    """What kinds may use of the model whose cache is made.

    Attributes:
        encode_pictures: pictures (B, H, W, C) of bytes to latents (B, h, w, c).
        channels: of those pictures.
        say: prints a line.
    """

    encode_pictures: Callable[[UInt8[np.ndarray, "B H W C"]], Float[np.ndarray, "B h w c"]]
    channels: int
    say: Callable[[str], None] = print


class _WithoutWeights:
    def reads_file(self, record: Record) -> bool:
        """As ``Condition`` says."""
        return False

    def width(self, source: ImageSource, record: Record) -> int | None:
        """As ``Condition`` says."""
        return None

    def free(self) -> None:
        """There is nothing to let go of."""


class Scalar(_WithoutWeights):
    """A number per picture: () in float32."""

    of_one_shape = True

    def __init__(self, name: str):
        self.name = name
        self.identity = {"kind": "scalar"}

    def missing(self, record: Record) -> str | None:
        """As ``Condition`` says."""
        value = record.columns.get(self.name)
        if _absent(value):
            return f"has no {self.name}"
        try:
            number = float(value)
        except (TypeError, ValueError):
            return f"has {self.name}={str(value)[:40]!r}, which is no number"
        return None if np.isfinite(number) else f"has {self.name}={number}"

    def prepare(self, sample: Sample) -> np.ndarray:
        """As ``Condition`` says."""
        return np.float32(sample.record.columns[self.name])

    def encode(self, prepared: np.ndarray) -> Float[np.ndarray, " B"]:
        """As ``Condition`` says."""
        return prepared


class Vector(_WithoutWeights):
    """Numbers per picture, (D,) in float32: a list in the data, or a column that names a .npy file."""

    of_one_shape = True

    def __init__(self, name: str):
        self.name = name
        self.identity = {"kind": "vector"}

    def missing(self, record: Record) -> str | None:
        """As ``Condition`` says."""
        return f"has no {self.name}" if _absent(record.columns.get(self.name)) else None

    def reads_file(self, record: Record) -> bool:
        """As ``Condition`` says."""
        value = record.columns.get(self.name)
        return isinstance(value, str) and not value.lstrip().startswith("[")

    def width(self, source: ImageSource, record: Record) -> int | None:
        """As ``Condition`` says."""
        return len(self.prepare(Sample(source, record, View(0, 0), None)))

    def prepare(self, sample: Sample) -> np.ndarray:
        """As ``Condition`` says."""
        record, value = sample.record, sample.record.columns[self.name]
        if isinstance(value, str) and value.lstrip().startswith("["):  # as csv files write lists
            value = _guarded(record, self.name, lambda: json.loads(sample.record.columns[self.name]))
        elif isinstance(value, str):
            data = sample.source.read(record, self.name)
            value = _guarded(record, self.name, lambda: np.load(io.BytesIO(data), allow_pickle=False))
        vector = _guarded(record, self.name, lambda: np.asarray(value, np.float32))
        if vector.size == 0 or vector.size != max(vector.shape, default=0):
            raise BadPicture(record.key, f"has {self.name} of shape {vector.shape}; a vector is needed")
        if not np.isfinite(vector).all():
            raise BadPicture(record.key, f"has {self.name} with values that are not finite")
        return vector.reshape(-1)

    def encode(self, prepared: np.ndarray) -> Float[np.ndarray, "B D"]:
        """As ``Condition`` says."""
        return prepared


class Picture(_WithoutWeights):
    """Latents (h, w, c) of a second picture, cut as the sample's own: what a ControlNet is given."""

    of_one_shape = False

    def __init__(self, name: str, encoders: Encoders):
        self.name, self._encoders = name, encoders
        self.identity = {"kind": "picture"}

    def missing(self, record: Record) -> str | None:
        """As ``Condition`` says."""
        return f"has no {self.name}" if _absent(record.columns.get(self.name)) else None

    def reads_file(self, record: Record) -> bool:
        """As ``Condition`` says."""
        return True

    def prepare(self, sample: Sample) -> UInt8[np.ndarray, "h w C"]:
        """As ``Condition`` says."""
        data = sample.source.read(sample.record, self.name)
        name = f"{sample.record.key} ({self.name})"
        return sample.view.of(decode_picture(data, name=name, channels=self._encoders.channels))

    def encode(self, prepared: UInt8[np.ndarray, "B H W C"]) -> Float[np.ndarray, "B h w c"]:
        """As ``Condition`` says."""
        return self._encoders.encode_pictures(prepared)


class OwnEdges(_WithoutWeights):
    """Latents (h, w, c) of what a filter draws of the picture itself."""

    of_one_shape = False

    def __init__(self, name: str, kind: str, encoders: Encoders):
        self.name, self._encoders = name, encoders
        self._filter, settings = FILTERS[kind]
        self.identity = {"kind": kind, **settings}

    def missing(self, record: Record) -> str | None:
        """As ``Condition`` says."""
        return self.missing_of(record)

    @staticmethod
    def missing_of(record: Record) -> str | None:
        """As ``missing``, of any of these filters."""
        return "has no picture to find edges in" if record.size is None else None

    def prepare(self, sample: Sample) -> UInt8[np.ndarray, "h w C"]:
        """As ``Condition`` says."""
        return self._filter(sample.picture)

    def encode(self, prepared: UInt8[np.ndarray, "B H W C"]) -> Float[np.ndarray, "B h w c"]:
        """As ``Condition`` says."""
        return self._encoders.encode_pictures(prepared)


class Siglip:
    """SigLIP's vector (D,), in float32, of the picture that a column names; uncut, and the same for mirror images."""

    of_one_shape = True

    def __init__(self, name: str, directory: str, encoders: Encoders):
        self.name = name
        self._encoder = self.open(name, directory, say=encoders.say)
        described = self._encoder.describe()
        self.identity = {
            "kind": "siglip",
            "id": self._encoder.id,
            **{name: described[name] for name in ("weights", "dtype", "features", "normalize")},
        }

    @staticmethod
    def open(name: str, directory: str, **options: Any) -> SiglipImageEncoder:
        """The encoder of the condition's pictures; its weights are read later.

        Raises:
            FileNotFoundError, UserError, CheckpointError: there is none, or a damaged one.
        """
        from sana_jax.image_encoders import SiglipImageEncoder

        if not os.path.isfile(os.path.join(directory, "config.json")):
            raise FileNotFoundError(
                f"--data.conditions {name}=siglip:{directory}: {os.path.abspath(directory)} is no SigLIP, it has no "
                f"config.json; write {name}=siglip:{_ARGUMENTS['siglip']}"
            )
        return SiglipImageEncoder.from_directory(directory, **options)

    def missing(self, record: Record) -> str | None:
        """As ``Condition`` says."""
        return f"has no {self.name}" if _absent(record.columns.get(self.name)) else None

    def reads_file(self, record: Record) -> bool:
        """As ``Condition`` says."""
        return True

    def prepare(self, sample: Sample) -> UInt8[np.ndarray, "S S 3"]:
        """As ``Condition`` says. Pictures are resized here, so that they make a batch."""
        from PIL import Image

        data = sample.source.read(sample.record, self.name)
        picture = decode_picture(data, name=f"{sample.record.key} ({self.name})", channels=3)
        how = self._encoder.preprocessing
        if how.height is None:
            return picture
        return np.asarray(Image.fromarray(picture).resize((how.width, how.height), how.resample))

    def width(self, source: ImageSource, record: Record) -> int | None:
        """As ``Condition`` says."""
        return self._encoder.embedding_dim

    def encode(self, prepared: UInt8[np.ndarray, "B S S 3"]) -> Float[np.ndarray, "B D"]:
        """As ``Condition`` says."""
        return self._encoder.encode(prepared)

    def free(self) -> None:
        """As ``Condition`` says."""
        self._encoder.free()


def canny_edges(picture: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W C"]:
    """Edges (Canny 1986) as 255 on 0, the same in every channel."""
    return _drawn(_canny(picture, CANNY_SIGMA), picture)


def soft_edges(picture: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W C"]:
    """How steep the smoothed gray picture is, as gray on black, the same in every channel: soft as HED's edges are."""
    from skimage.filters import gaussian, sobel

    return _drawn(SOFT_GAIN * sobel(gaussian(_gray(picture), SOFT_SIGMA)), picture)


def scribble(picture: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W C"]:
    """A few coarse strokes as 255 on 0, the same in every channel: edges of the smoothed picture, joined and thickened.

    Edges that lie close together are thickened into one and thinned to its middle line, and that is drawn as a stroke.
    """
    from skimage.morphology import dilation, disk, skeletonize

    joined = dilation(_canny(picture, SCRIBBLE_SIGMA), disk(SCRIBBLE_JOINED))
    return _drawn(dilation(skeletonize(joined), disk(SCRIBBLE_STROKE)), picture)


def _gray(picture: UInt8[np.ndarray, "H W C"]) -> Float[np.ndarray, "H W"]:
    return picture.astype(np.float32).mean(-1) / 255


def _canny(picture: UInt8[np.ndarray, "H W C"], sigma: float) -> np.ndarray:
    from skimage.feature import canny

    return canny(_gray(picture), sigma=sigma, low_threshold=CANNY_LOW, high_threshold=CANNY_HIGH)


def _drawn(strength: np.ndarray, like: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W C"]:
    """Values (H, W), cut to [0, 1], as bytes in every channel."""
    drawn = np.round(np.clip(strength, 0, 1) * 255).astype(np.uint8)
    return np.repeat(drawn[..., None], like.shape[-1], axis=-1)


_CANNY = {"low": CANNY_LOW, "high": CANNY_HIGH}
# kind -> what draws a control picture of a picture, and the settings that it depends on
FILTERS: dict[str, tuple[Callable[[UInt8[np.ndarray, "H W C"]], UInt8[np.ndarray, "H W C"]], dict[str, Any]]] = {
    "canny": (canny_edges, {"sigma": CANNY_SIGMA, **_CANNY}),
    "soft_edges": (soft_edges, {"sigma": SOFT_SIGMA, "gain": SOFT_GAIN}),
    "scribble": (
        scribble,
        {"sigma": SCRIBBLE_SIGMA, **_CANNY, "joined": SCRIBBLE_JOINED, "stroke": SCRIBBLE_STROKE},
    ),
}

Factory = Callable[[str, str, Encoders], Condition]


def _without_argument(make: Callable[[str, Encoders], Condition]) -> Factory:
    return lambda name, _, encoders: make(name, encoders)


def _own_edges(kind: str, name: str, encoders: Encoders) -> Condition:
    return OwnEdges(name, kind, encoders)


# kind -> (name, what follows the colon, encoders) -> condition
KINDS: dict[str, Factory] = {
    "scalar": _without_argument(lambda name, _: Scalar(name)),
    "vector": _without_argument(lambda name, _: Vector(name)),
    "picture": _without_argument(Picture),
    **{kind: _without_argument(partial(_own_edges, kind)) for kind in FILTERS},
    "siglip": Siglip,
}
# kind -> what follows the colon; others take nothing
_ARGUMENTS = {"siglip": "DIRECTORY, with a published SigLIP"}


class Declared(NamedTuple):
    """A condition as ``--data.conditions`` has it: name=kind or name=kind:argument."""

    name: str
    kind: str
    argument: str


def declared_conditions(texts: Sequence[str]) -> list[Declared]:
    """What ``--data.conditions`` declares.

    Raises:
        UserError: a kind that there is not, a name that comes twice, or an argument that is not allowed or missing.
    """
    found: dict[str, Declared] = {}
    for text in texts:
        name, _, kind = text.partition("=")
        kind, _, argument = kind.partition(":")
        if kind not in KINDS:
            raise UserError(
                f"--data.conditions {text}: there is no kind {kind!r}; choose one of {', '.join(KINDS)}, as in "
                f"{name}=scalar"
            )
        if name == "latents" or name in found:
            raise UserError(
                f"--data.conditions {text}: the name {name!r} is taken; give each input a column and name of its own"
            )
        if argument and kind not in _ARGUMENTS:
            raise UserError(f"--data.conditions {text}: {kind} takes nothing after a colon; write {name}={kind}")
        if kind in _ARGUMENTS and not argument:
            raise UserError(f"--data.conditions {text} names no model; write {name}={kind}:{_ARGUMENTS[kind]}")
        found[name] = Declared(name, kind, argument)
    return list(found.values())


def make_conditions(declared: Sequence[str], encoders: Encoders) -> tuple[Condition, ...]:
    """The conditions that ``--data.conditions`` declares.

    Raises:
        UserError: as ``declared_conditions``, or a model that can't be opened.
    """
    return tuple(KINDS[kind](name, argument, encoders) for name, kind, argument in declared_conditions(declared))


def missing_input(declared: Declared, record: Record) -> str | None:
    """Why a record has no such input, or None if it has one; without the model that would encode it."""
    if declared.kind in FILTERS:
        return OwnEdges.missing_of(record)
    if declared.kind == "scalar":
        return Scalar(declared.name).missing(record)
    return f"has no {declared.name}" if _absent(record.columns.get(declared.name)) else None


def unreadable_input(declared: Declared, source: ImageSource, record: Record) -> str | None:
    """Why what a record has as its input can't be read, or None; without the model that would encode it.

    Raises:
        UserError: the column names no file, which ends training.
    """
    try:
        if declared.kind == "vector":
            Vector(declared.name).width(source, record)
        elif declared.kind in ("picture", "siglip"):
            name = f"{record.key} ({declared.name})"
            decode_picture(source.read(record, declared.name), name=name, channels=3)
    except BadPicture as error:
        return str(error).removeprefix(f"{record.key} ")
    return None


def _absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and np.isnan(value))


def _guarded(record: Record, name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (ValueError, TypeError, OSError, EOFError) as error:
        reason = reason_of(error, 80)
        raise BadPicture(record.key, f"has {name} that is no vector of numbers ({reason})") from error
