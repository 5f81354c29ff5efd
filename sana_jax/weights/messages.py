"""Words for errors about weights: short, on one line, and not the whole list where the list is long."""

from __future__ import annotations

import os
import re
from typing import Any

import jax.numpy as jnp

from sana_jax.errors import reason_of

NAMED_IN_A_MESSAGE = 5


def first_few(problems: list[str], kind: str) -> str:
    """The first few problems, and how many more ``kind`` there are."""
    more = len(problems) - NAMED_IN_A_MESSAGE
    return "; ".join(problems[:NAMED_IN_A_MESSAGE]) + (f"; and {more} more {kind}" if more > 0 else "")


def one_line(error: BaseException, limit: int = 240) -> str:
    """An error's reason without line breaks and without the storage specification that tensorstore appends."""
    text = str(error)
    if code := re.search(r"os_error_code='(\d+)'", text):  # nested in three layers of paths that say no more
        what = re.search(r'Error (reading|writing) "([^"]+)"', text)
        return os.strerror(int(code[1])) + (f" while {what[1]} {what[2]}" if what else "")
    text = re.split(r" \[tensorstore_spec| See full TensorStore details", text)[0]
    return reason_of(text, limit) if text.strip() else type(error).__name__


def describe_array(leaf: Any) -> str:
    """``float32[2,3]`` of anything with a dtype and a shape."""
    return f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
