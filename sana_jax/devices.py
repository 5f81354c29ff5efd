"""Choosing what to run on."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager

import jax

from kernels.selection import AUTO, DEFAULT, DEVICE_PROGRAMS, preferring
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


@contextlib.contextmanager
def computing(name: str, kernels: str = AUTO, option: str = "--kernels") -> Iterator[jax.Device]:
    """What a command that computes does it in: the device that was chosen.

    On a CPU, memory is kept between calls; programs are kept on disk, and what is traced inside has the kernels asked
    for.

    Args:
        name: the option ``--device``.
        kernels: one of ``kernels.selection.PREFERENCES``.
        option: what the user calls it.

    Raises:
        UserError: JAX sees no such device, or these kernels do not run on it.
    """
    keep_freed_memory(name)
    device = choose_device(name)
    enable_compilation_cache()
    with using_kernels(kernels, device, option):
        yield device


def using_kernels(name: str, device: jax.Device, option: str = "--kernels") -> AbstractContextManager[None]:
    """For programs traced inside, what runs an operation that has several implementations.

    Args:
        name: one of ``kernels.selection.PREFERENCES``.
        device: where the programs run.
        option: what the user calls it.

    Raises:
        UserError: these kernels do not run there.
    """
    platform = device.platform if device.platform != "gpu" else _kind_of_gpu(device)
    if name in DEVICE_PROGRAMS and platform not in DEVICE_PROGRAMS[name]:
        raise UserError(
            f"{option} {name} has programs for {' and '.join(DEVICE_PROGRAMS[name])} alone, and this runs on "
            f"{platform}; choose {AUTO} or {DEFAULT}"
        )
    if name == "triton" and importlib.util.find_spec("jax_triton") is None:
        raise UserError(
            f"{option} triton: jax-triton is not installed; pip install 'sana-jax[gpu]', or choose auto, xla or pallas"
        )
    return preferring(name)


def _kind_of_gpu(device: jax.Device) -> str:
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
