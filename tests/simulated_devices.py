"""The flags of a program that is to see several devices on a CPU; without JAX, which reads them when it is imported."""

from __future__ import annotations

import os


def simulated_devices(count: int) -> str:
    """``XLA_FLAGS`` for so many devices, with what this process compiles with; of two counts XLA takes the last."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
