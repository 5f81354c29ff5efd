"""What a user asks for: a format per network, checked against what the device can multiply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from sana_jax.errors import UserError
from sana_jax.quantization.formats import FORMATS
from sana_jax.quantization.trees import DEFAULT_EXCLUDE

NETWORKS = ("transformer", "text_encoder", "autoencoder", "connectors")
# The first NVIDIA architecture (Ada) whose tensor cores multiply float8.
_FIRST_FP8_CAPABILITY = (8, 9)


class Quantization(NamedTuple):
    """How one network is quantised.

    Attributes:
        format: one of ``FORMATS``.
        exclude: regular expressions of layers' paths; a layer in whose path one is found keeps its dtype.
    """

    format: str
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE


QuantizationChoice = str | Sequence[str] | Mapping[str, str | Quantization] | None


def parse_quantization(
    given: QuantizationChoice, name: str = "quantization", networks: Sequence[str] = NETWORKS
) -> dict[str, Quantization]:
    """Network -> how it is quantised.

    Args:
        given: a format, for the transformer; a mapping of networks to formats or ``Quantization``; texts as the command
            line has them, each FORMAT or NETWORK=FORMAT; None for nothing.
        name: what messages call it.
        networks: that there are.

    Raises:
        UserError: a format or a network that is not known, or a network twice.
    """
    if given is None:
        return {}
    if isinstance(given, str):
        given = [given]
    pairs: list[tuple[str, Any]] = []
    for one in given.items() if isinstance(given, Mapping) else given:
        if isinstance(one, str):
            network, found, format_name = one.partition("=")
            one = (network, format_name) if found else ("transformer", network)
        pairs.append(one)
    chosen: dict[str, Quantization] = {}
    for network, one in pairs:
        one = one if isinstance(one, Quantization) else Quantization(one)
        if network not in networks or one.format not in FORMATS:
            raise UserError(
                f"{name} {network}={one.format} is not allowed; allowed is one of {', '.join(FORMATS)} for the "
                f"transformer, or NETWORK=FORMAT with a network of {', '.join(networks)}: choose from those"
            )
        if network in chosen:
            raise UserError(f"{name} names {network} twice, {chosen[network].format} and {one.format}; keep one")
        chosen[network] = one
    return chosen


def check_device(format_name: str, device: jax.Device | None = None) -> str | None:
    """A line about how a device computes a format, None where it does so itself.

    Raises:
        UserError: the device has no arithmetic for the format.
    """
    device = jax.local_devices()[0] if device is None else device
    if format_name != "fp8":
        return None
    if device.platform == "cpu":
        return (
            "fp8 is emulated on a CPU: values are rounded to float8_e4m3fn and multiplied as float32, slower than "
            "without quantization"
        )
    capability = _capability(device)
    if device.platform in ("gpu", "cuda") and capability is not None and capability >= _FIRST_FP8_CAPABILITY:
        return None
    seen = "" if capability is None else f" of compute capability {capability[0]}.{capability[1]}"
    raise UserError(
        f"quantization fp8: {device.device_kind}{seen} does not multiply float8_e4m3fn, which NVIDIA GPUs from "
        f"{_FIRST_FP8_CAPABILITY[0]}.{_FIRST_FP8_CAPABILITY[1]} on do; choose int8, or int4 for the least memory"
    )


def _capability(device: jax.Device) -> tuple[int, int] | None:
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
