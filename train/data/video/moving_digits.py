"""Clips of handwritten digits that move: real pixels, and motion that can be measured.

A digit of scikit-learn's moves at a constant speed across a black canvas whose opposite sides are joined, so that its
direction is the same in clips of any length. Digit and direction are in the caption, as in "a seven moving left". A
digit keeps to the middle of the canvas across its way, and starts a whole number of steps from a side along it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from configs.data import MovingDigitsDataConfig
from kernels.typing import Float, Int
from sana_jax.autoencoders import PixelVideoAutoencoder
from sana_jax.errors import UserError
from sana_jax.text_encoders import WordEncoder
from train.batch import Batch
from train.data.digits import NAMES, check_digits, load_images

# (rows, columns) per frame, rows counted downwards; the first four are those of four directions
DIRECTIONS: dict[str, tuple[int, int]] = {
    "right": (0, 1),
    "left": (0, -1),
    "up": (-1, 0),
    "down": (1, 0),
    "up right": (-1, 1),
    "up left": (-1, -1),
    "down right": (1, 1),
    "down left": (1, -1),
}
BLACK = -1.0
# What the random numbers are for.
_SPLIT, _START = range(2)


class Clip(NamedTuple):
    """What a clip shows."""

    image: int
    """Which of the digits' pictures."""
    digit: int
    direction: str
    start: tuple[int, int]
    """(top, left) of the digit in the first frame."""


def move(
    image: Float[np.ndarray, "h w 1"], direction: str, start: tuple[int, int], frames: int, canvas: int, speed: int = 1
) -> Float[np.ndarray, "F H W 1"]:
    """A picture that moves across a black canvas and comes back on the other side.

    Args:
        image: in [-1, 1], no larger than the canvas.
        direction: a name of ``DIRECTIONS``.
        start: (top, left) in the first frame; any whole numbers.
        frames: F.
        canvas: H and W.
        speed: pixels per frame.
    """
    height, width = image.shape[:2]
    still = np.full((canvas, canvas, 1), BLACK, np.float32)
    still[:height, :width] = image
    down, right = DIRECTIONS[direction]
    top, left = start
    places = [(top + speed * down * frame, left + speed * right * frame) for frame in range(frames)]
    return np.stack([np.roll(still, place, (0, 1)) for place in places])


@dataclass(frozen=True)
class MovingDigitsData:
    """All clips in memory, as ``DigitsData`` has pictures; the autoencoder and the text encoder belong to the data.

    A sample is a picture of a digit with a direction. Where it starts is drawn anew for each batch, from ``choices``;
    without these it is a function of (seed, sample).

    Args:
        config: what the clips are like.
        part: clips of the pictures for training, or of those that are held out.

    Raises:
        UserError: a caption or digits that are not possible.
    """

    config: MovingDigitsDataConfig
    part: str = "train"

    def __post_init__(self):
        check_digits(self.config.digits)
        caption, most = self.config.caption, self.config.max_words
        first, second = self._filled(0, "right"), self._filled(1, "left")
        told_apart = len({first, second, self._filled(0, "left"), self._filled(1, "right")}) == 4
        if not told_apart or "{digit}" not in caption or "{direction}" not in caption:
            raise UserError(
                f"--data.caption {caption!r} must have {{digit}} and {{direction}}, which become the digit's name and "
                "where it moves, and no other braces; write it like 'a {digit} moving {direction}'"
            )
        longest = max(self.captions, key=lambda text: len(text.split()))
        if len(longest.split()) > most:
            raise UserError(
                f"--data.caption {caption!r} becomes {longest!r} of {len(longest.split())} words, --data.max-words "
                f"allows {most}; shorten the one or raise the other"
            )
        if self.part not in ("train", "held_out"):
            raise UserError(f"part {self.part!r} is not allowed; choose train or held_out")

    def _filled(self, digit: int, direction: str) -> str:
        try:
            return self.config.caption.format(digit=NAMES[digit], direction=direction)
        except (LookupError, ValueError):
            return self.config.caption

    @cached_property
    def _pictures(self) -> tuple[np.ndarray, np.ndarray]:
        """Pictures of this part and which digit each shows."""
        images, labels = load_images(self.config.digits)
        order = self._generator(_SPLIT).permutation(len(images))
        count = round(self.config.held_out * len(images))
        if self.part == "held_out" and not count:
            raise UserError(f"--data.held-out {self.config.held_out:g} keeps no pictures from training; raise it")
        chosen = np.sort(order[:count] if self.part == "held_out" else order[count:])
        return images[chosen], labels[chosen]

    def _generator(self, *name: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.config.seed, *name))))

    @property
    def directions(self) -> tuple[str, ...]:
        """Names of the directions in use."""
        return tuple(DIRECTIONS)[: self.config.directions]

    @property
    def autoencoder(self) -> PixelVideoAutoencoder:
        """Latents are the pixels."""
        return PixelVideoAutoencoder(channels=1)

    @cached_property
    def text_encoder(self) -> WordEncoder:
        """Knows the captions' words."""
        return WordEncoder.of_captions(self.captions, self.config.embedding_dim, self.config.max_words + 1)

    @property
    def captions(self) -> list[str]:
        """The distinct captions, digit by digit: what previews draw."""
        digits = sorted(set(self.config.digits))
        # neighbours differ in both, so that the first few show different digits and directions
        count = len(self.directions)
        return [
            self._filled(digit, self.directions[(place + turn) % count])
            for turn in range(count)
            for place, digit in enumerate(digits)
        ]

    def meaning_of(self, caption: str) -> tuple[int, str]:
        """Digit and direction of one of ``captions``.

        Raises:
            UserError: another text.
        """
        for digit in sorted(set(self.config.digits)):
            for direction in self.directions:
                if self._filled(digit, direction) == caption:
                    return digit, direction
        raise UserError(f"{caption!r} is no caption of these clips; allowed are {self.captions[0]!r} and the like")

    @property
    def preview_shape(self) -> tuple[int, int, int, int]:
        """(T, H, W, C) of a sample."""
        return (self.config.frames, self.config.canvas, self.config.canvas, 1)

    @property
    def buckets(self) -> dict[tuple[int, int, int, int], np.ndarray]:
        """All samples have one shape."""
        return {self.preview_shape: np.arange(len(self))}

    @cached_property
    def validation(self) -> MovingDigitsData | None:
        """Clips of the held-out pictures; None where there are none."""
        if self.part == "held_out" or not round(self.config.held_out * 100):
            return None
        return MovingDigitsData(self.config, "held_out")

    def __len__(self) -> int:
        return len(self._pictures[0]) * len(self.directions)

    def clip(self, index: int, place: float | None = None) -> Clip:
        """What a sample shows.

        Args:
            index: of the sample.
            place: uniform in [0, 1): where it starts; None: where (seed, index) says.
        """
        image, number = divmod(int(index), len(self.directions))
        place = float(self._generator(_START, int(index)).random()) if place is None else float(place)
        start = self._start(self.directions[number], place)
        return Clip(image, int(self._pictures[1][image]), self.directions[number], start)

    def _start(self, direction: str, place: float) -> tuple[int, int]:
        """(top, left) in the first frame: a whole number of steps along its way, and in the middle across it."""
        canvas, side, speed = self.config.canvas, self._pictures[0].shape[1], self.config.speed
        along = int(place * -(-canvas // speed)) * speed
        return tuple(along if moves else (canvas - side) // 2 for moves in DIRECTIONS[direction])

    def caption_of(self, index: int) -> str:
        """A sample's caption."""
        clip = self.clip(index)
        return self._filled(clip.digit, clip.direction)

    def videos(
        self, indices: Int[np.ndarray, " B"], choices: Float[np.ndarray, "B 2"] | None = None
    ) -> Float[np.ndarray, "B F H W 1"]:
        """The samples' pixels in [-1, 1]."""
        config, places = self.config, [None] * len(indices) if choices is None else choices[:, 1]
        clips = [self.clip(index, place) for index, place in zip(indices, places)]
        images = self._pictures[0]
        return np.stack(
            [move(images[c.image], c.direction, c.start, config.frames, config.canvas, config.speed) for c in clips]
        )

    def encode(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings and masks of captions."""
        return self.text_encoder.encode(captions)

    def null_encoding(self) -> tuple[np.ndarray, np.ndarray]:
        """The encoding of no text."""
        return self.text_encoder.null_encoding()

    @cached_property
    def _encoded(self) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
        return {text: row for row, text in enumerate(self.captions)}, *self.text_encoder.encode(self.captions)

    def batch(self, indices: Int[np.ndarray, " B"], choices: Float[np.ndarray, "B 2"] | None = None) -> Batch:
        """The samples of these indices, as arrays; the second of a sample's ``choices`` is where its digit starts."""
        row_of, embeds, mask = self._encoded
        rows = [row_of[self.caption_of(index)] for index in indices]
        latents = self.autoencoder.encode(self.videos(indices, choices))
        return Batch(np.asarray(latents, np.float32), embeds[rows], mask[rows])

    def describe(self) -> str:
        """One line for the start of a run."""
        config, held_out = self.config, self.validation
        beside = f"; {len(held_out._pictures[0])} pictures are held out" if held_out is not None else ""
        return (
            f"{len(self._pictures[0]):,} handwritten digits (scikit-learn) moving in {config.directions} directions: "
            f"clips of {config.frames} frames of {config.canvas}x{config.canvas} gray, {len(self.captions)} captions "
            f"such as {self.captions[0]!r}{beside}"
        )
