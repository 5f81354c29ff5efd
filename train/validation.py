"""The loss of pictures that are kept from training, at fixed noise levels and with fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from configs.schema import RunConfig
from kernels.typing import Array, Float, Int, PyTree
from sana_jax.compilation import compile_ahead
from train.assembly import RunParts, refuse_nothing_held_out
from train.batch import Batch
from train.data.loader import Shape
from train.evaluation.validation_loss import validation_losses
from train.sharding import batch_sharding, batch_stays_cut, local_rows, replicated, to_global


class _Part(NamedTuple):
    """A batch of validation samples, their numbers, and which of them only fill it."""

    shape: Shape
    batch: Batch
    numbers: Int[np.ndarray, " B"]
    counted: Float[np.ndarray, " B"]


def gives_first(config: RunConfig) -> bool:
    """Whether the first latent frame of clips is given, as that of most clips of the training is."""
    if getattr(config.chunk_causal, "image_to_video", False):  # of a video model, whose clips all have it given
        return True
    return getattr(config.flow, "image_to_video", 0.0) > 0.5


class Validator:
    """Measures the loss of held-out samples; compiled once per shape of latents.

    Args:
        parts: of the run; ``validation`` of its configuration says when, at which levels and on how many samples.
        mesh: the devices.

    Raises:
        UserError: nothing is held out.
    """

    def __init__(self, parts: RunParts, mesh: Mesh):
        self._parts, self._mesh, self._config = parts, mesh, parts.config.validation
        self._data = parts.dataset.validation if self._config.every else None
        self._compiled: dict[Shape, jax.stages.Compiled] = {}
        if self._config.every and self._data is None:
            refuse_nothing_held_out(parts.config)

    def due(self, step: int) -> bool:
        """Whether the loss is measured after this step."""
        every = self._config.every
        return bool(every) and (step % every == 0 or step == self._parts.config.steps)

    def compile(self, abstract_params: PyTree, frozen: PyTree | None, say: Callable[[str], None]) -> None:
        """Compiles the loss for every shape ahead of time."""
        sharding, everywhere = batch_sharding(self._mesh), replicated(self._mesh)
        for part in self._batches():
            if part.shape in self._compiled:
                continue
            abstract = jax.tree.map(
                lambda array: jax.ShapeDtypeStruct((self._rows, *array.shape[1:]), array.dtype, sharding=sharding),
                part[1:],
            )
            name = f"the validation loss for latents {'x'.join(map(str, (self._rows, *part.shape)))}"
            function = jax.jit(self._losses, out_shardings=everywhere)
            self._compiled[part.shape] = compile_ahead(name, function, abstract_params, frozen, abstract, say=say)

    def measure(self, params: PyTree, frozen: PyTree | None) -> dict[str, float]:
        """The mean loss, and that of each noise level, for a row of metrics."""
        sharding, (first, _) = batch_sharding(self._mesh), self._local
        totals, count = np.zeros(len(self._config.sigmas)), 0.0
        for part in self._batches():
            arrays = to_global(part[1:], sharding, self._rows, first)
            weight = float(part.counted.sum()) if jax.process_count() == 1 else self._counted_everywhere(part)
            totals += weight * np.asarray(self._compiled[part.shape](params, frozen, arrays), np.float64)
            count += weight
        losses = totals / count
        levels = {f"validation_loss_sigma_{s:.2f}": float(x) for s, x in zip(self._config.sigmas, losses)}
        return {"validation_loss": float(losses.mean()), **levels}

    def _losses(self, params: PyTree, frozen: PyTree | None, arrays: PyTree) -> Float[Array, " K"]:
        batch, numbers, counted = arrays
        recipe = self._parts.recipe
        first_given = gives_first(self._parts.config) and batch.latents.shape[1] > 1

        def velocity(noisy, timestep, batch):
            return recipe.velocity(params, frozen, noisy, timestep, batch, None)

        with batch_stays_cut(batch.latents.shape[0]):
            return validation_losses(
                velocity,
                batch,
                self._config.sigmas,
                self._config.seed,
                indices=numbers,
                counted=counted,
                first_given=first_given,
            )

    @property
    def _rows(self) -> int:
        return self._parts.config.batch_size

    @property
    def _local(self) -> tuple[int, int]:
        return local_rows(batch_sharding(self._mesh), self._rows)

    def _batches(self) -> Iterator[_Part]:
        """This process's rows of every batch; samples are spread evenly over those that are held out."""
        most = min(self._config.samples, len(self._data))
        chosen = set(np.linspace(0, len(self._data) - 1, most).round().astype(int).tolist())
        first, end = self._local
        for shape, indices in self._data.buckets.items():
            own = [index for index in np.asarray(indices).tolist() if index in chosen]
            for begin in range(0, len(own), self._rows):
                numbers = np.asarray(own[begin : begin + self._rows])
                counted = (np.arange(self._rows) < len(numbers)).astype(np.float32)
                numbers = np.pad(numbers, (0, self._rows - len(numbers)), mode="edge").astype(np.int32)
                load = partial(self._data.batch, numbers[first:end])
                yield _Part(shape, load(), numbers[first:end], counted[first:end])

    @staticmethod
    def _counted_everywhere(part: _Part) -> float:
        from jax.experimental import multihost_utils

        return float(multihost_utils.process_allgather(part.counted.sum()).sum())
