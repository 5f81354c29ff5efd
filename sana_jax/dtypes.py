"""The dtypes that networks compute in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from sana_jax.errors import UserError

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def parse_dtype(dtype: Any, of: str = "dtype", reasons: Mapping[str, str] | None = None) -> Any:
    """float32 or bfloat16, by name or as a dtype.

    Args:
        dtype: the name or the dtype.
        of: whose it is, for the message: ``"text encoder dtype"``.
        reasons: by name, why a dtype that one might expect is not allowed.

    Raises:
        UserError: any other.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in _DTYPES:
        reason = f" ({reasons[name]})" if reasons and name in reasons else ""
        raise UserError(f"{of} {name!r} is not allowed{reason}; choose float32 or bfloat16")
    return _DTYPES[name]
