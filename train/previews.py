"""Samples along the way: every caption, the same noise each time. A preview that fails never stops a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kernels.typing import PyTree
from sana_jax.compilation import compile_ahead
from sana_jax.errors import reason_of
from sana_jax.files import natural_order
from sana_jax.images import automatic_enlargement, enlarge_image, image_grid, save_png, to_pil
from sana_jax.pipelines.sampling_function import initial_latents
from train.assembly import RunParts
from train.batch import CAMERA, FIRST_FRAME
from train.metrics import MetricsWriter
from train.preview_clips import clip_table, write_moving
from train.recipes import Prompts
from train.run_directory import run_sampler
from train.sharding import replicated


class Previewer:
    """Draws ``samples/step_<step>.png``: one column per caption, one row per noise, below the control pictures if any.

    Of clips it is a table of their frames, and the clips themselves are beside it as ``.gif`` and, in colour, ``.mp4``.
    ``writing`` is held while a file is written, so that nothing ends the process in between.
    """

    def __init__(self, parts: RunParts, mesh: Mesh, writing: AbstractContextManager):
        self.failures = 0
        self._parts, self._mesh, self._writing = parts, mesh, writing
        self._config = parts.config
        self._sample: Callable | None = None
        self._control: jax.Array | None = None
        if self._config.preview.every:
            parts.dataset.encode(self.captions)  # says before anything is compiled which prompt it does not know

    @cached_property
    def captions(self) -> list[str]:
        """What is drawn: prompts, or captions of the data; those of the examples, where these give more than words."""
        preview = self._config.preview
        if preview.prompts:
            return list(preview.prompts)
        if self._parts.recipe.conditions:
            source, indices = self._examples
            return [source.caption_of(index) for index in indices]
        return self._parts.dataset.captions[: preview.captions] or [""]  # pictures may have none

    @cached_property
    def _examples(self) -> tuple[Any, list[int]]:
        """Samples whose conditions are drawn with, and the data that they are of; held-out ones where there are any."""
        dataset, preview = self._parts.dataset, self._config.preview
        source = dataset.validation or dataset
        indices = source.buckets.get(dataset.preview_shape, ())
        if not len(indices):
            source, indices = dataset, dataset.buckets[dataset.preview_shape]
        most = min(len(preview.prompts) or preview.captions, len(indices))
        chosen = np.linspace(0, len(indices) - 1, most).round().astype(int)
        return source, [int(indices[place]) for place in chosen]

    def _conditions(self) -> dict[str, np.ndarray]:
        """Of every column of the grid, once per row; empty for a network that reads none."""
        names = self._parts.recipe.conditions
        if not names:
            return {}
        source, indices = self._examples
        repeated = [indices[column % len(indices)] for column in range(len(self.captions))]
        batch = source.batch(np.asarray(repeated * self._config.preview.per_caption))
        conditions = {name: batch.conditions[name] for name in names}
        if CAMERA in names:  # a world is drawn from the sample's own beginning
            conditions[FIRST_FRAME] = np.asarray(batch.latents[:, :1])
        return conditions

    @property
    def example_prompt(self) -> str:
        """A caption to try the finished model with."""
        return self.captions[0 if self._config.preview.prompts else min(7, len(self.captions) - 1)]

    def due(self, step: int) -> bool:
        """Whether a preview belongs to this step."""
        preview = self._config.preview
        if preview.every == 0:
            return False
        return step % preview.every == 0 or step in preview.at or step == self._config.steps

    def path(self, step: int) -> Path:
        """Where the preview of a step is."""
        return Path(self._config.run_dir) / "samples" / f"step_{step:06d}.png"

    @property
    def newest(self) -> Path | None:
        """The last preview that was drawn."""
        return max(self.path(0).parent.glob("step_*.png"), key=lambda path: natural_order(path.name), default=None)

    def missing(self, step: int) -> bool:
        """Whether a preview belongs to this step and is not there. The same on every process."""
        missing = self.due(step) and not self.path(step).exists()
        if jax.process_count() == 1:
            return missing
        from jax.experimental import multihost_utils

        return bool(multihost_utils.broadcast_one_to_all(np.asarray(missing)))

    def compile(self, abstract_params: PyTree, frozen: PyTree | None, say: Callable[[str], None]) -> None:
        """Compiles sampling ahead of time; ``frozen`` as shapes."""
        preview, dataset = self._config.preview, self._parts.dataset
        if late := [step for step in preview.at if step > self._config.steps]:
            words = ", ".join(map(str, late))
            say(f"previews: none at {words} (--preview.at), since the run has {self._config.steps} steps")
        rows = preview.per_caption * len(self.captions)
        *sizes, channels = dataset.preview_shape
        everywhere = replicated(self._mesh)
        prompts = Prompts(*dataset.encode(self.captions * preview.per_caption), *dataset.null_encoding())
        # Picture i has the noise that generate gives its picture i, in PyTorch's order.
        latents = jnp.moveaxis(initial_latents(preview.seed, rows, (channels, *sizes)), 1, -1)
        inputs = jax.device_put((np.asarray(latents), prompts, self._conditions()), everywhere)
        if self._parts.recipe.kind == "controlnet":
            self._control = inputs[2][self._parts.recipe.condition][: len(self.captions)]
        sampling = self._parts.recipe.sampling_function(
            run_sampler(self._config), preview.num_inference_steps, preview.guidance_scale
        )
        shape = "x".join(map(str, sizes))
        name = f"sampling of {rows} previews ({shape} latents, {preview.num_inference_steps} steps)"
        jitted = jax.jit(sampling, out_shardings=everywhere)
        compiled = compile_ahead(name, jitted, abstract_params, frozen, *inputs, say=say)
        self._sample = lambda params, frozen: compiled(params, frozen, *inputs)

    def draw(
        self, step: int, params: PyTree, frozen: PyTree | None, writer: MetricsWriter, say: Callable[[str], None]
    ) -> Path | None:
        """Samples, writes the grid, and returns where it is; None if it failed, which is said and counted.

        ``frozen`` are the base model's parameters, where the recipe keeps them.
        """
        try:
            started = time.perf_counter()
            latents = self._sample(params, frozen)
            if self._control is not None:  # as what the network is given shows them
                latents = jnp.concatenate([self._control.astype(latents.dtype), latents])
            images = self._decode(latents)
            if free := getattr(self._parts.autoencoder, "free", None):
                free()  # until the next preview
            if jax.process_index() != 0:
                return None
            finite = np.isfinite(images).all()
            if not finite:
                raise FloatingPointError("samples are not finite")
            path, images = self.path(step), (images / 2 + 0.5).clip(0, 1)
            metadata = {"step": step, "seed": self._config.preview.seed}
            grid = self._grid(images) if images.ndim == 4 else clip_table(images, self._labels)
            with self._writing:  # the picture last, since it says that the preview is there
                if images.ndim == 5:
                    where, columns, fps = path.with_suffix(""), len(self.captions), self._parts.fps
                    write_moving(where, images, columns, self._labels, fps, metadata, say)
                save_png(path, grid, metadata=metadata)
            writer.write_image(step, "samples", grid)
            say(f"preview: {path} ({time.perf_counter() - started:.1f} s)")
            return path
        except Exception as error:
            self.failures += 1
            reason = reason_of(error, 300)
            say(f"warning: the preview at step {step} failed, training goes on: {type(error).__name__}: {reason}")
            return None

    def _decode(self, latents: jax.Array) -> np.ndarray:
        """Pictures, or clips, which are decoded one after another as the pipelines do."""
        decode = self._parts.autoencoder.decode
        if latents.ndim == 4:
            return np.asarray(decode(latents))
        return np.concatenate([np.asarray(decode(latents[row : row + 1])) for row in range(len(latents))])

    @property
    def _labels(self) -> list[str]:
        """Of every sample."""
        labels = short_labels(self.captions)
        if hasattr(self._parts.dataset, "actions"):  # the camera is all in which such clips differ
            source, indices = self._examples
            labels = [source.actions[indices[column % len(indices)]] for column in range(len(labels))]
        return labels * self._config.preview.per_caption

    def _grid(self, images: np.ndarray) -> Any:
        factor = automatic_enlargement(*images.shape[1:3]) // 2 or 1
        pictures = [enlarge_image(to_pil(image), factor) for image in images]
        labels, columns = self._labels, len(self.captions)
        if self._control is not None:
            labels = ["control"] * columns + labels
        return image_grid(pictures, columns=columns, labels=labels)


def short_labels(captions: Sequence[str], longest: int = 24) -> list[str]:
    """Captions without the words that all of them begin with, and cut to what fits above a picture."""
    words = [caption.split() for caption in captions]
    common = 0
    if len(words) > 1:
        common = next((i for i, column in enumerate(zip(*words)) if len(set(column)) > 1), min(map(len, words)))
    rest = [" ".join(own[common:]) or caption for own, caption in zip(words, captions)]
    return [text if len(text) <= longest else text[: longest - 1].rstrip() + "…" for text in rest]
