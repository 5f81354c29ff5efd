"""How a configuration says that a value is not allowed."""

from __future__ import annotations

from sana_jax.errors import UserError


def require(option: str, value, condition: bool, allowed: str) -> None:
    """Raises ``UserError`` with the option, its value and what is allowed, unless the condition holds."""
    if not condition:
        raise UserError(f"--{option} {value} is not allowed; allowed is {allowed}: change it, or leave it out")
