"""Files of poses and intrinsics."""

from __future__ import annotations

import os
import pathlib
import zipfile

import numpy as np

from sana_jax.errors import UserError


def read_array(name: str | os.PathLike[str], option: str, holds: str) -> np.ndarray:
    """The one array of an .npy file; nothing of it is checked.

    Args:
        name: of the file.
        option: that names it, for messages.
        holds: what the option takes, in words.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is empty, cut short, or something else than an array.
    """
    path = pathlib.Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {option} takes an .npy file of {holds}")
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is no .npy file of numbers; {option} takes what numpy.save wrote: write it anew"
        ) from error
    if not isinstance(found, np.ndarray):  # of an .npz
        with found:
            there = ", ".join(found.files) or "none"
        raise UserError(
            f"{path} holds arrays by name ({there}), and {option} takes an .npy file of one: write it with "
            "numpy.save(NAME.npy, numpy.load(FILE)[ARRAY])"
        )
    return found
