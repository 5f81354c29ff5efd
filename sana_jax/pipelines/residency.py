"""Which of a pipeline's networks are in memory when, and what that takes: said before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from sana_jax.compilation import readable_bytes
from sana_jax.errors import UserError
from sana_jax.weights.components import Resident

# all: nothing is freed. text_encoder_freed: the text encoder goes before sampling starts, and is read again for prompts
# that were not encoded before. one_at_a_time: only the network that is at work is in memory.
Residency = Literal["all", "text_encoder_freed", "one_at_a_time"]
RESIDENCIES = ("all", "text_encoder_freed", "one_at_a_time")

TEXT, CONNECTORS, TRANSFORMER = "text encoder", "text connectors", "transformer"
CONTROLNET, AUTOENCODER = "controlnet", "autoencoder"
# Networks that are needed for texts alone.
_OF_TEXTS = (TEXT, CONNECTORS)
# stage -> the networks that work in it
STAGES = {"text": (TEXT,), "connect": (CONNECTORS,), "denoise": (TRANSFORMER, CONTROLNET), "decode": (AUTOENCODER,)}


def check_residency(residency: str) -> None:
    """Raises ``UserError`` for a name that is not a residency."""
    if residency not in RESIDENCIES:
        raise UserError(f"residency {residency!r} is not allowed; choose one of {', '.join(RESIDENCIES)}")


def leave(name: str, residency: Residency, networks: Mapping[str, Resident | None]) -> None:
    """Frees a network that has done its work, unless the residency keeps it.

    Its weights stay in host memory where there is room beside a GPU, and are not read from the disk again.
    """
    weights = networks.get(name)
    goes = residency == "one_at_a_time" or (residency == "text_encoder_freed" and name in _OF_TEXTS)
    if weights is not None and goes:
        if weights.keep_on_host():
            print(f"the {name} leaves the device for host memory, {readable_bytes(weights.num_bytes)}")
        weights.free()


def describe_plan(
    residency: Residency, networks: Mapping[str, Resident | None], *, encodes_a_picture: bool = False
) -> list[str]:
    """One line per stage of the next call: the weights that are in memory then, and their size together.

    Weights are read when a stage first needs them. ``encodes_a_picture``: the autoencoder works before denoising too.
    """
    sized = {name: weights for name, weights in networks.items() if weights is not None and weights.num_bytes}
    if len(sized) == 1:
        return [_sized(name, weights) for name, weights in sized.items()]
    present = [name for name, weights in sized.items() if weights.loaded]
    stages = {stage: working for stage, working in STAGES.items() if stage != "connect" or CONNECTORS in sized}
    if encodes_a_picture:
        stages = {"text": STAGES["text"], "encode": (AUTOENCODER,), **stages}
    lines = []
    for stage, working in stages.items():
        present = [name for name in sized if name in present or name in working]
        named = ", ".join(_sized(name, sized[name]) for name in present) or "no weights"
        total = sum(sized[name].num_bytes for name in present)
        lines.append(f"{stage}: {named}" + (f"; together {readable_bytes(total)}" if len(present) > 1 else ""))
        if residency == "one_at_a_time":
            present = [name for name in present if sized[name].stays]
        elif residency == "text_encoder_freed":
            present = [name for name in present if name not in _OF_TEXTS or sized[name].stays]
    return lines


def _sized(name: str, weights: Resident) -> str:
    beside = f" and {readable_bytes(weights.host_bytes)} in host memory" if weights.host_bytes else ""
    return f"{name} {readable_bytes(weights.num_bytes)}{beside}"
