"""How a configuration says that a value is not allowed."""

from __future__ import annotations

from sana_jax.errors import UserError


def require(option: str, value: object, condition: bool, allowed: str) -> None:
    """Raises ``UserError`` with the option's whole name, its value and what is allowed, unless the condition holds.

    The name may be that of a field and the value a tuple: they are shown as a command line has them.
    """
    if not condition:
        shown = " ".join(map(str, value)) or "(none)" if isinstance(value, tuple) else value
        option = option.replace("_", "-")
        raise UserError(f"--{option} {shown} is not allowed; allowed is {allowed}: change it, or leave it out")
