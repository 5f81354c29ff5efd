"""What drawn pictures are measured against: a folder of pictures, the digits, or features that were computed before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.typing import Float
from sana_jax.errors import UserError
from sana_jax.files import atomic_file
from sana_jax.images import to_pil
from sana_jax.pipelines.image_inputs import read_picture
from train.data.sources.listing import PICTURE_SUFFIXES
from train.evaluation.distances import Gaussian, check_features, fit_gaussian
from train.evaluation.features import FeatureFunction

if TYPE_CHECKING:
    from PIL import Image

DIGITS = "digits"
_MOST_UNREADABLE = 0.1  # of a folder's pictures
_SMALL = 16  # px: below this pictures are read as they are


@dataclass(frozen=True)
class Reference:
    """Features of a set of pictures, or only their mean and covariance.

    Attributes:
        name: what it is, for the record.
        count: pictures; None where a file does not say.
        features: (N, D); None where a file holds statistics only.
        gaussian: of the features.
    """

    name: str
    count: int | None
    features: Float[np.ndarray, "N D"] | None
    gaussian: Gaussian


def load_reference(text: str, function: FeatureFunction | None, digits: Sequence[int]) -> Reference:
    """The reference that an option names.

    Args:
        text: a folder of pictures, ``digits``, or a ``.npy`` (features (N, D)) or ``.npz`` file.
        function: of the samples; None takes the file's word for its own.
        digits: which of the digits.

    Raises:
        FileNotFoundError, UserError: no such thing, unreadable pictures, or features of another function.
    """
    path = Path(text)
    if text == DIGITS:
        features = function(digit_pictures(digits))
    elif path.is_dir():
        features = function(FolderPictures(path))
    elif path.suffix in (".npy", ".npz"):
        return read_features(path, function)
    else:
        raise FileNotFoundError(
            f"--reference {text} is neither a folder, nor a .npy or .npz file, nor the word {DIGITS}; name one of these"
        )
    return Reference(text, len(features), features, fit_gaussian(features))


def digit_pictures(digits: Sequence[int]) -> list[Image.Image]:
    """The real digits as pictures of 8x8 pixels."""
    from train.data.digits import load_images

    return [to_pil(image / 2 + 0.5) for image in load_images(tuple(digits))[0]]


class FolderPictures:
    """The pictures of a folder and of the folders in it, in the order of their names, each read when it comes.

    One that can't be read is named and counted; more than a tenth of them is an error. After they were read, ``read``
    has the paths of those that could be.

    Raises:
        UserError: no pictures, or too many that can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = sorted(
            p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and not p.name.startswith(".")
        )
        if not self.paths:
            raise UserError(
                f"{folder} has no pictures; allowed are {', '.join(PICTURE_SUFFIXES)}: name a folder with some"
            )
        self.read: list[Path] = []

    def __iter__(self) -> Iterator[Image.Image]:
        unreadable, self.read = 0, []
        for path in self.paths:
            try:
                picture = _read(path)
                self.read.append(path)
                yield picture
            except (UserError, OSError) as error:
                unreadable += 1
                print(f"skipped {path}: {error}")
                if unreadable > _MOST_UNREADABLE * len(self.paths):
                    raise UserError(
                        f"{unreadable} of {len(self.paths)} pictures in {self.folder} can't be read; more than a tenth "
                        "would change what is measured: mend or delete them"
                    ) from error
        if unreadable:
            print(f"{unreadable} of {len(self.paths)} pictures in {self.folder} were skipped")


def _read(path: Path) -> Image.Image:
    from PIL import Image

    with Image.open(path) as picture:
        if min(picture.size) < _SMALL:
            return picture.convert("RGB")
    return read_picture(path, str(path))


def captions_beside(folder: Path) -> list[str]:
    """The texts of the ``.txt`` files beside a folder's pictures; empty unless every picture has one."""
    texts = [path.with_suffix(".txt") for path in FolderPictures(folder).paths]
    if not all(path.is_file() for path in texts):
        return []
    return [path.read_text("utf-8", errors="replace").strip() for path in texts]


def save_features(path: Path, reference: Reference, function: FeatureFunction) -> None:
    """Writes a ``.npz`` with features, mean, covariance, and the function's name; whole or not at all.

    Raises:
        UserError: the name does not end in ``.npz`` or can't be written.
    """
    check_features_path(path)
    arrays: dict[str, Any] = {
        "mean": reference.gaussian.mean,
        "covariance": reference.gaussian.covariance,
        "function": function.name,
        "count": -1 if reference.count is None else reference.count,
    }
    if reference.features is not None:
        arrays["features"] = reference.features
    try:
        with atomic_file(path) as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose a folder that can be written to") from error


def check_features_path(path: Path) -> None:
    """Raises ``UserError`` for a name that does not end in ``.npz``: before the features are computed."""
    if path.suffix != ".npz":
        raise UserError(
            f"--save-reference {path} is not allowed; the name ends in .npz: try {path.with_suffix('.npz')}"
        )


def read_features(path: Path, function: FeatureFunction | None) -> Reference:
    """Features (N, D) of a ``.npy`` file; or of a ``.npz`` file with ``features``, ``mean`` and ``covariance``, or, as
    other programs write them, ``mu`` and ``sigma``.

    Raises:
        FileNotFoundError, UserError: no such file, another content, or features of another function.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--reference {path} is not a file; compute it first with --save-reference")
    try:
        content = np.load(path, allow_pickle=False)
        arrays = {"features": content} if isinstance(content, np.ndarray) else dict(content)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--reference {path} is damaged or no NumPy file ({error}); compute it again") from error
    made_by = str(arrays["function"]) if "function" in arrays else None
    if made_by is None:
        print(f"{path} does not say which function its features are of; it is taken to be that of the samples")
    elif function is not None and made_by != function.name:
        raise UserError(
            f"--reference {path} has features of {made_by!r}, the samples those of {function.name!r}; choose the same "
            "--features for both"
        )
    features = check_features(arrays["features"]) if "features" in arrays else None
    mean = arrays.get("mean", arrays.get("mu"))
    covariance = arrays.get("covariance", arrays.get("sigma"))
    if features is None and (mean is None or covariance is None):
        raise UserError(
            f"--reference {path} has {', '.join(sorted(arrays))}; allowed are features, or mean and covariance, or mu "
            "and sigma: compute it with --save-reference"
        )
    gaussian = fit_gaussian(features) if mean is None or covariance is None else Gaussian(mean, covariance)
    count = int(arrays["count"]) if "count" in arrays else None if features is None else len(features)
    return Reference(str(path), None if count == -1 else count, features, gaussian)
