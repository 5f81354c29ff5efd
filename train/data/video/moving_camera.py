"""Clips of a photograph on a plane, seen by a camera that moves: real pixels, and motion that is known exactly.

The plane is one unit in front of the first camera and parallel to its picture; the photograph covers it, mirrored
again and again beyond its borders. The camera starts as the identity and moves as an action string of one or two holds
says, so the true video of every path can be computed: pixels of a frame are where their rays meet the plane. The
photograph is as sharp as the first frame can show, whatever comes nearer later.

Training knows some action strings. The others, and with each the one of opposite keys, are held out.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from configs.moving_camera import MovingCameraDataConfig
from kernels.typing import Float, Int
from sana_jax.autoencoders import PixelVideoAutoencoder
from sana_jax.camera import (
    ActionScheme,
    action_to_c2w,
    camera_directions,
    camera_inputs,
    find_scheme,
    intrinsics_of_field,
)
from sana_jax.errors import UserError
from sana_jax.text_encoders import WordEncoder
from train.batch import Batch

# One axis each: forward and back, sideways, yaw, pitch.
OPPOSITE_KEYS = (("w", "s"), ("a", "d"), ("j", "l"), ("i", "k"))
_OPPOSITE = {key: other for pair in OPPOSITE_KEYS for key, other in (pair, pair[::-1])}
_STILL = "none"
SPANS = (96, 136, 192)  # pixels of the photograph that the first frame spans
BLUR = 0.8  # standard deviation in pixels of the first frame
_STEP = 8  # pixels of the photograph between places that a view may have in its middle
# What the random numbers are for.
_SPLIT, _VIEW = range(2)


class View(NamedTuple):
    """What the first camera sees.

    Attributes:
        photograph: which.
        span: pixels of the photograph across the first frame: one of ``SPANS``.
        middle: (row, column) of the photograph in the middle of the first frame.
        mirrored: whether left and right are exchanged.
    """

    photograph: str
    span: int
    middle: tuple[float, float]
    mirrored: bool


@functools.lru_cache(maxsize=8)
def load_photograph(name: str) -> Float[np.ndarray, "h w 3"]:
    """One of ``PHOTOGRAPHS``, float32 in [-1, 1]; it comes with scikit-learn or scikit-image."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(f"{name}.jpg")
    else:
        import skimage.data

        pixels = getattr(skimage.data, name)()
    return pixels.astype(np.float32) / 127.5 - 1.0


class Texture(NamedTuple):
    """A photograph that has the sharpness of a frame.

    Attributes:
        pixels: in [-1, 1].
        reduced: pixels of the photograph, down and across, that one of these stands for.
    """

    pixels: Float[np.ndarray, "h w 3"]
    reduced: int

    def at(self, places: Float[np.ndarray, "*N 2"]) -> Float[np.ndarray, "*N 3"]:
        """Values at (row, column) of the photograph, see ``bilinear``."""
        return bilinear(self.pixels, (places - (self.reduced - 1) / 2) / self.reduced)


@functools.lru_cache(maxsize=32)
def texture(name: str, span: int, canvas: int) -> Texture:
    """A photograph for frames of ``canvas`` pixels, the first of which spans ``span`` of its own."""
    from scipy.ndimage import gaussian_filter

    sharp, step = load_photograph(name), span / canvas
    reduced = max(1, int(step / 4))
    height, width = (side // reduced * reduced for side in sharp.shape[:2])
    blocks = sharp[:height, :width].reshape(height // reduced, reduced, width // reduced, reduced, 3)
    blurs = (BLUR * step / reduced,) * 2 + (0,)
    return Texture(gaussian_filter(blocks.mean((1, 3)), blurs, mode="mirror"), reduced)


@functools.lru_cache(maxsize=32)
def _middles(name: str, span: int, canvas: int) -> Int[np.ndarray, "N 2"]:
    """Places that may be in the middle: the half of them around which there are the most edges across and along.

    Motion along a single edge, or before a clear sky, could not be seen.
    """
    from scipy.ndimage import uniform_filter

    seen = texture(name, span, canvas)
    down, across = np.gradient(seen.pixels.mean(-1))
    window = span // seen.reduced
    rows, columns = (uniform_filter(np.square(slope), window) for slope in (down, across))
    both = uniform_filter(down * across, window)
    fewer = rows + columns - np.hypot(rows - columns, 2 * both)  # twice the lesser eigenvalue of the structure tensor
    middles = [np.arange(span // 2, side * seen.reduced - span // 2 + 1, _STEP) for side in fewer.shape]
    found = fewer[np.ix_(*(middle // seen.reduced for middle in middles))]
    places = np.argwhere(found >= np.median(found))
    return np.stack([middles[axis][places[:, axis]] for axis in range(2)], axis=1)


def plane_points(
    c2w: Float[np.ndarray, "F 4 4"], intrinsics: Float[np.ndarray, "4"], height: int, width: int
) -> Float[np.ndarray, "F H W 2"]:
    """Where the pixels' rays meet the plane z = 1 of the world: (x, y) in units, float64; NaN where they do not.

    Args:
        c2w: camera-to-world matrices.
        intrinsics: fx, fy, cx, cy in pixels.
        height: of a frame.
        width: the same.
    """
    poses = np.asarray(c2w, np.float64)
    rays = np.einsum("fij,hwj->fhwi", poses[:, :3, :3], camera_directions(intrinsics, height, width))
    position = poses[:, None, None, :3, 3]
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = (1.0 - position[..., 2]) / rays[..., 2]
    distance = np.where((rays[..., 2] > 0) & (distance > 0), distance, np.nan)
    return (position + distance[..., None] * rays)[..., :2]


def bilinear(picture: Float[np.ndarray, "h w C"], places: Float[np.ndarray, "*N 2"]) -> Float[np.ndarray, "*N C"]:
    """Values of a picture between its pixels, float32; beyond its borders it is mirrored without end.

    Args:
        picture: any values.
        places: (row, column), counted from the middle of the first pixel.
    """
    base = np.floor(places)
    down, across = np.moveaxis((places - base).astype(np.float32), -1, 0)[..., None]
    base = base.astype(np.int64)
    (top, bottom), (left, right) = (
        (_folded(base[..., axis], side), _folded(base[..., axis] + 1, side))
        for axis, side in enumerate(picture.shape[:2])
    )
    above = picture[top, left] * (1 - across) + picture[top, right] * across
    below = picture[bottom, left] * (1 - across) + picture[bottom, right] * across
    return above * (1 - down) + below * down


def _folded(index: np.ndarray, side: int) -> np.ndarray:
    """Indices of a row that goes to and fro without end; its two ends are there once each time."""
    index = np.abs(index) % (2 * side - 2)
    return np.minimum(index, 2 * side - 2 - index)


def opposite(action: str) -> str:
    """The action string that moves the other way at every moment."""
    segments = (segment.rpartition("-") for segment in action.split(","))
    turned = ((keys if keys == _STILL else "".join(_OPPOSITE[key] for key in keys), n) for keys, _, n in segments)
    return ",".join(f"{keys}-{count}" for keys, count in turned)


def all_actions(steps: int) -> tuple[str, ...]:
    """All action strings of one hold of ``steps`` frames, or of two that make as many.

    A hold is no key, one, or two of different axes; something is held at some time.
    """
    ones = [key for pair in OPPOSITE_KEYS for key in pair]
    twos = [a + b for first, second in itertools.combinations(OPPOSITE_KEYS, 2) for a in first for b in second]
    holds = [_STILL, *ones, *twos]
    single = [f"{keys}-{steps}" for keys in holds[1:]]
    double = [
        f"{first}-{count},{second}-{steps - count}"
        for count in range(1, steps)
        for first, second in itertools.permutations(holds, 2)
    ]
    return tuple(single + double)


@dataclass(frozen=True)
class MovingCameraData:
    """Clips rendered as they are asked for; the autoencoder and the text encoder belong to the data.

    A sample is an action string. What part of which photograph it shows is drawn anew for each batch, from
    ``choices``; without these it is a function of (seed, sample).

    Args:
        config: what the clips are like.
        part: clips of the action strings for training, or of those that are held out.

    Raises:
        UserError: another part.
    """

    config: MovingCameraDataConfig
    part: str = "train"

    def __post_init__(self):
        if self.part not in ("train", "held_out"):
            raise UserError(f"part {self.part!r} is not allowed; choose train or held_out")

    def _generator(self, *name: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.config.seed, *name))))

    @cached_property
    def actions(self) -> tuple[str, ...]:
        """The action strings of this part; with each of them there is the one of opposite keys."""
        strings = all_actions(self.config.frames - 1)
        pairs = [action for action in strings if action <= opposite(action)]
        order = self._generator(_SPLIT).permutation(len(pairs))
        count = max(1, round(self.config.held_out * len(pairs)))
        chosen = np.sort(order[:count] if self.part == "held_out" else order[count:])
        return tuple(action for index in chosen for action in dict.fromkeys((pairs[index], opposite(pairs[index]))))

    @property
    def scheme(self) -> ActionScheme:
        """What keys mean and how far they move: scheme v1 with the speeds of the configuration."""
        speeds = {"translation_speed": self.config.translation_speed, "rotation_speed": self.config.rotation_speed}
        return find_scheme("v1", **speeds)

    @property
    def intrinsics(self) -> Float[np.ndarray, "4"]:
        """fx, fy, cx, cy in pixels: a camera that looks through the middle of a frame, between its pixels."""
        side = self.config.canvas
        focal = intrinsics_of_field(self.config.field_of_view, side, side)[0]
        return np.array([focal, focal, (side - 1) / 2, (side - 1) / 2], np.float32)

    def poses(self, action: str) -> Float[np.ndarray, "F 4 4"]:
        """The camera-to-world matrices of an action string."""
        return action_to_c2w(action, self.scheme, num_frames=self.config.frames)

    def view(self, index: int, place: float | None = None) -> View:
        """What the first frame of a sample shows.

        Args:
            index: of the sample.
            place: uniform in [0, 1): decides it; None: (seed, index) decides.
        """
        name = (int(index),) if place is None else (int(index), int(place * 2**32))
        draw = self._generator(_VIEW, len(name), *name)
        photograph = self.config.photographs[draw.integers(len(self.config.photographs))]
        span = SPANS[draw.integers(len(SPANS))]
        middles = _middles(photograph, span, self.config.canvas)
        row, column = middles[draw.integers(len(middles))] + draw.uniform(-_STEP / 2, _STEP / 2, 2)
        return View(photograph, span, (float(row), float(column)), bool(draw.integers(2)))

    def render(self, view: View, c2w: Float[np.ndarray, "F 4 4"]) -> Float[np.ndarray, "F H W 3"]:
        """The true video of a camera's path, float32 in [-1, 1].

        Args:
            view: what the first camera sees.
            c2w: camera-to-world matrices; the first camera is the world.
        """
        side, intrinsics = self.config.canvas, self.intrinsics
        points = plane_points(c2w, intrinsics, side, side)
        scale = view.span / side * float(intrinsics[0])  # pixels of the photograph per unit
        places = points[..., ::-1] * scale * np.array([1.0, -1.0 if view.mirrored else 1.0])
        return texture(view.photograph, view.span, side).at(places + np.asarray(view.middle))

    @property
    def autoencoder(self) -> PixelVideoAutoencoder:
        """Latents are the pixels."""
        return PixelVideoAutoencoder(channels=3)

    @cached_property
    def text_encoder(self) -> WordEncoder:
        """Knows the caption's words."""
        return WordEncoder.of_captions(self.captions, self.config.embedding_dim, self.config.max_words + 1)

    @property
    def captions(self) -> list[str]:
        """The one caption that there is."""
        return [self.config.caption]

    @property
    def preview_shape(self) -> tuple[int, int, int, int]:
        """(T, H, W, C) of a sample."""
        return (self.config.frames, self.config.canvas, self.config.canvas, 3)

    @property
    def buckets(self) -> dict[tuple[int, int, int, int], np.ndarray]:
        """All samples have one shape."""
        return {self.preview_shape: np.arange(len(self))}

    @cached_property
    def validation(self) -> MovingCameraData | None:
        """Clips of the held-out action strings; None for those themselves."""
        return MovingCameraData(self.config, "held_out") if self.part == "train" else None

    def __len__(self) -> int:
        return len(self.actions)

    def caption_of(self, index: int) -> str:
        """A sample's caption."""
        return self.config.caption

    def videos(
        self, indices: Int[np.ndarray, " B"], choices: Float[np.ndarray, "B 2"] | None = None
    ) -> Float[np.ndarray, "B F H W 3"]:
        """The samples' pixels in [-1, 1]."""
        places = [None] * len(indices) if choices is None else choices[:, 1]
        return np.stack(
            [
                self.render(self.view(index, place), self.poses(self.actions[index]))
                for index, place in zip(indices, places)
            ]
        )

    def encode(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings and masks of captions."""
        return self.text_encoder.encode(captions)

    def null_encoding(self) -> tuple[np.ndarray, np.ndarray]:
        """The encoding of no text."""
        return self.text_encoder.null_encoding()

    @cached_property
    def _encoded(self) -> tuple[np.ndarray, np.ndarray]:
        return self.text_encoder.encode(self.captions)

    def conditions(self, indices: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """What the network is told of the samples' cameras: see ``sana_jax.camera.CameraInputs``."""
        side = self.config.canvas
        intrinsics = np.tile(self.intrinsics, (self.config.frames, 1))
        sizes = {"height": side, "width": side, "temporal_factor": 1, "spatial_factor": 1}
        cameras = [camera_inputs(self.poses(self.actions[index]), intrinsics, **sizes) for index in indices]
        return {
            "camera_conditions": np.stack([camera.conditions for camera in cameras]),
            "chunk_plucker": np.stack([camera.chunk_plucker for camera in cameras]),
        }

    def batch(self, indices: Int[np.ndarray, " B"], choices: Float[np.ndarray, "B 2"] | None = None) -> Batch:
        """The samples of these indices, as arrays; the second of a sample's ``choices`` is what it shows."""
        embeds, mask = (np.repeat(array, len(indices), 0) for array in self._encoded)
        latents = self.autoencoder.encode(self.videos(indices, choices))
        return Batch(np.asarray(latents, np.float32), embeds, mask, self.conditions(indices))

    def describe(self) -> str:
        """One line for the start of a run."""
        config = self.config
        return (
            f"{len(config.photographs)} photographs (scikit-learn, scikit-image) on a plane, {len(self):,} paths of a "
            f"camera before it: clips of {config.frames} frames of {config.canvas}x{config.canvas}, "
            f"{config.translation_speed:g} units and {config.rotation_speed:g} degrees per frame and key"
            + (f"; {len(self.validation)} paths are held out" if self.validation is not None else "")
        )
