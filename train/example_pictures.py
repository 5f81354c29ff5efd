"""Makes a folder of pictures to try fine-tuning on: ``python -m train.example_pictures pictures/``.

The pictures are handwritten digits of scikit-learn, 8x8 pixels, as PNG files with a text beside each, which is its
caption. By default eight threes, dark on light, where the digits that the embedded default learns from are light on
dark; ``--style plain --count 0`` writes all digits as they are, and ``--style placed`` each somewhere in a larger
picture.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from kernels.typing import Float
from sana_jax.command_line import parse
from sana_jax.errors import UserError, run_command_line
from sana_jax.files import atomic_directory
from sana_jax.images import save_png
from train.data.digits import NAMES, load_images

PROG, INSPECT = "python -m train.example_pictures", "python -m train.inspect_data"
FARTHEST = 2  # pixels that ``moved`` moves to the left or right
ROOM = 4  # pixels that ``placed`` is higher and wider than a digit
Picture = Float[np.ndarray, "8 8 1"]


def _striped(picture: Picture, rng: np.random.Generator) -> Picture:
    striped = picture.copy()
    striped[1::2] *= 0.25
    return striped


def _moved(picture: Picture, rng: np.random.Generator) -> Picture:
    move = int(rng.integers(-FARTHEST, FARTHEST, endpoint=True))
    wide = np.pad(picture, ((0, 0), (FARTHEST, FARTHEST), (0, 0)))
    return wide[:, FARTHEST - move : FARTHEST - move + picture.shape[1]]


def _placed(picture: Picture, rng: np.random.Generator) -> Float[np.ndarray, "12 12 1"]:
    top, left = rng.integers(0, ROOM, 2, endpoint=True)
    return np.pad(picture, ((top, ROOM - top), (left, ROOM - left), (0, 0)))


# Of a picture in [0, 1], light on dark.
STYLES: dict[str, Callable[[Picture, np.random.Generator], np.ndarray]] = {
    "negative": lambda picture, rng: 1 - picture,
    "striped": _striped,
    "moved": _moved,
    "plain": lambda picture, rng: picture,
    "placed": _placed,
}


@dataclass(frozen=True)
class ExampleConfig:
    """Writes pictures of handwritten digits with captions into a new folder."""

    folder: str
    """The folder; new, or empty."""
    digits: tuple[int, ...] = (3,)
    """Which digits: one or more of 0 to 9."""
    count: int = 8
    """Pictures of each digit; 0 for all that there are."""
    style: Literal["negative", "striped", "moved", "plain", "placed"] = "negative"
    """Dark on light; with dark stripes; each moved to the left or right, by up to two pixels; as they are; or each
    somewhere in a black picture of 12x12 pixels."""
    copies: int = 1
    """How often each is written, moved or placed differently."""
    caption: str = "a handwritten {digit}"
    """Their captions; {digit} becomes the digit's name."""

    def __post_init__(self):
        if self.count < 0:
            raise UserError(f"--count {self.count} is not allowed; choose 1 or more, or 0 for all")
        if self.copies < 1 or (self.copies > 1 and self.style not in ("moved", "placed")):
            raise UserError(
                f"--copies {self.copies} is not allowed; choose 1, or more with --style moved or --style placed, whose "
                "copies differ"
            )
        if not self.digits or not set(self.digits) <= set(range(10)):
            given = " ".join(map(str, self.digits)) or "(none)"
            raise UserError(f"--digits {given} is not allowed; choose one or more of 0 to 9")


def write_example(config: ExampleConfig) -> int:
    """Writes the folder, which appears when everything is in it; returns how many pictures there are.

    Raises:
        UserError: the folder has something in it.
    """
    folder = Path(config.folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} has something in it already; name a new folder, or delete it")
    images, labels = load_images(config.digits)
    written = 0
    with atomic_directory(folder) as temporary:
        for digit in dict.fromkeys(config.digits):
            places = np.flatnonzero(labels == digit)
            for place in places[: config.count or None]:
                for copy in range(config.copies):
                    stem = f"{NAMES[digit]}_{place:04d}" + (f"_{copy}" if config.copies > 1 else "")
                    rng = np.random.default_rng(place + copy * len(images))
                    save_png(temporary / f"{stem}.png", STYLES[config.style](images[place] / 2 + 0.5, rng))
                    caption = config.caption.replace("{digit}", NAMES[digit])
                    (temporary / f"{stem}.txt").write_text(caption + "\n")
                    written += 1
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words[0] = f"--folder={words[0]}"
    config = parse(ExampleConfig, words, prog=f"{PROG} FOLDER")
    count = write_example(config)
    side = 8 + ROOM if config.style == "placed" else 8
    print(
        f"{config.folder}: {count} pictures of {side}x{side} pixels with captions; look at them with "
        f"{INSPECT} {config.folder}"
    )
    return 0


if __name__ == "__main__":
    run_command_line(main)
