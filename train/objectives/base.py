"""What the training step asks of an objective."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from kernels.typing import Array, Bool, Float, Int, PyTree
from train.batch import Batch


class SampleLosses(NamedTuple):
    """Loss and noise level of each sample."""

    loss: Float[Array, " B"]
    sigma: Float[Array, " B"]


class PhaseLosses(NamedTuple):
    """What a step of one kind reports: each sample's loss, its flow level, and further figures by name; float32."""

    loss: Float[Array, " B"]
    sigma: Float[Array, " B"]
    figures: dict[str, Float[Array, " B"]]


class Objective(Protocol):
    """A loss as a pure function of parameters, a batch, and what is random about it."""

    def draw(self, seed: int, step: int | Int[Array, ""], batch: Batch) -> PyTree:
        """Everything random at one step, for a whole batch; every array has B as its first axis.

        Made for the batch at once, so that neither accumulation nor the mesh changes it.
        """
        ...

    def losses(self, trained: PyTree, frozen: PyTree | None, batch: Batch, draws: PyTree) -> SampleLosses:
        """Each sample's loss in float32.

        Args:
            trained: what the optimizer updates.
            frozen: the base model's parameters, where they stay beside it; None without.
            batch: samples, or a part of them.
            draws: of ``draw``, the same part.
        """
        ...


class VelocityNetwork(Protocol):
    """A network as flow matching calls it; see ``train.recipes.base.Recipe``."""

    def draw(self, seed: int, step: int | Int[Array, ""], drop_caption: Bool[Array, " B"]) -> PyTree:
        """What is random inside the network at one training step, given which samples lose their captions."""
        ...

    def velocity(
        self,
        trained: PyTree,
        frozen: PyTree | None,
        noisy: Float[Array, "B *X C"],
        timestep: Float[Array, " B"] | Float[Array, "B T"],
        batch: Batch,
        draws: PyTree,
    ) -> Float[Array, "B *X C"]:
        """The predicted velocity; a time of each latent frame is for video models alone."""
        ...
