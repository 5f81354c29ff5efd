"""An implementation's reason why it cannot run what is asked of it."""

from __future__ import annotations


class Refusal(ValueError):
    """Raised while a program is traced: for inputs, options or a mesh that an implementation does not take.

    Named implementations let it through as the ``ValueError`` that it is; where None has picked one, another runs.
    """
