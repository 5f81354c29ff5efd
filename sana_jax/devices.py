"""Choosing what to run on."""

from __future__ import annotations

import jax

from sana_jax.compilation import enable_compilation_cache
from sana_jax.errors import UserError
from sana_jax.host_memory import keep_freed_memory


def prefer_device(name: str) -> None:
    """Says ``"cpu"`` to JAX before it first looks for devices, which keeps it from taking a GPU's memory."""
    if name == "cpu":
        jax.config.update("jax_platforms", "cpu")


def choose_device(name: str) -> jax.Device:
    """This process's first device of the kind ``"auto"``, ``"cpu"`` or ``"gpu"``.

    Raises:
        UserError: JAX sees none of that kind.
    """
    prefer_device(name)
    if name == "auto":
        return jax.local_devices()[0]
    try:
        return jax.local_devices(backend=name)[0]
    except RuntimeError as error:
        seen = jax.local_devices()[0].platform
        raise UserError(
            f"--device {name}: JAX sees no such device, only {seen}; allowed here are auto and {seen}: leave --device "
            "out, or install JAX for this machine's GPU (pip install '.[gpu]')"
        ) from error


def start_computing(name: str) -> jax.Device:
    """What a command that computes does first: on a CPU, memory is kept between calls, and programs are kept on disk.

    Args:
        name: the option ``--device``.

    Returns:
        The device that was chosen.

    Raises:
        UserError: JAX sees none of that kind.
    """
    keep_freed_memory(name)
    device = choose_device(name)
    enable_compilation_cache()
    return device
