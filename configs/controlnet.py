"""What a ControlNet's training can be told."""

from __future__ import annotations

from dataclasses import dataclass

from sana_jax.errors import UserError


@dataclass(frozen=True)
class ControlNetConfig:
    """Training of a ControlNet beside a model that stays as it is (arXiv 2302.05543)."""

    num_layers: int = 7
    """Blocks that are copied from the model's first ones; 7 in the published ControlNets. Fewer than the model has."""
    condition: str = "control"
    """The column of the data that is the control picture: one of --data.conditions."""

    def __post_init__(self):
        if self.num_layers < 1:
            raise UserError(f"--controlnet.num-layers {self.num_layers} is not allowed; choose 1 or more, as 7")
