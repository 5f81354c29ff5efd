"""Sample grids along the way: every caption, the same noise each time. A preview that fails never stops a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from configs.schema import RunConfig
from kernels.typing import PyTree
from sana_jax.compilation import compile_ahead
from sana_jax.images import automatic_enlargement, enlarge_image, image_grid, save_png, to_pil
from sana_jax.models.sana import SanaTransformer
from sana_jax.pipelines.sampling_function import initial_latents, make_sampling_fn
from train.metrics import MetricsWriter
from train.run_directory import run_sampler
from train.sharding import replicated


class Previewer:
    """Draws ``samples/step_<step>.png``: one column per caption, one row per noise.

    ``writing`` is held while a file is written, so that nothing ends the process in between.
    """

    def __init__(
        self, config: RunConfig, dataset, transformer: SanaTransformer, mesh: Mesh, writing: AbstractContextManager
    ):
        self.failures = 0
        self._writing = writing
        self._config, self._dataset, self._mesh = config, dataset, mesh
        self._transformer = transformer
        self._sample: Callable | None = None

    @property
    def example_prompt(self) -> str:
        """A caption to try the finished model with."""
        captions = self._dataset.captions
        return captions[min(7, len(captions) - 1)]

    def due(self, step: int) -> bool:
        """Whether a preview belongs to this step."""
        preview = self._config.preview
        if preview.every == 0:
            return False
        return step % preview.every == 0 or step in preview.at or step == self._config.steps

    def path(self, step: int) -> Path:
        """Where the preview of a step is."""
        return Path(self._config.run_dir) / "samples" / f"step_{step:06d}.png"

    def missing(self, step: int) -> bool:
        """Whether a preview belongs to this step and is not there. The same on every process."""
        missing = self.due(step) and not self.path(step).exists()
        if jax.process_count() == 1:
            return missing
        from jax.experimental import multihost_utils

        return bool(multihost_utils.broadcast_one_to_all(np.asarray(missing)))

    def compile(self, abstract_params: PyTree, say: Callable[[str], None]) -> None:
        """Compiles sampling ahead of time."""
        preview = self._config.preview
        rows = preview.per_caption * len(self._dataset.captions)
        height, width, channels = self._dataset.latent_shape
        everywhere = replicated(self._mesh)
        embeds, mask = self._dataset.text_encoder.encode(self._dataset.captions * preview.per_caption)
        null = self._dataset.text_encoder.null_encoding()
        # Picture i has the noise that generate gives its picture i, in PyTorch's order.
        latents = initial_latents(preview.seed, rows, (channels, height, width)).transpose(0, 2, 3, 1)
        inputs = jax.device_put((np.asarray(latents), embeds, mask, *null), everywhere)
        sampling = make_sampling_fn(
            self._transformer, run_sampler(self._config), preview.num_inference_steps, preview.guidance_scale
        )
        name = f"sampling of {rows} previews ({height}x{width} latents, {preview.num_inference_steps} steps)"
        compiled = compile_ahead(name, jax.jit(sampling, out_shardings=everywhere), abstract_params, *inputs, say=say)
        self._sample = lambda params: compiled(params, *inputs)

    def draw(self, step: int, params: PyTree, writer: MetricsWriter, say: Callable[[str], None]) -> Path | None:
        """Samples, writes the grid, and returns where it is; None if it failed, which is said and counted."""
        try:
            started = time.perf_counter()
            latents = self._sample(params)
            images = np.asarray(self._dataset.autoencoder.decode(latents))
            if jax.process_index() != 0:
                return None
            finite = np.isfinite(images).all()
            if not finite:
                raise FloatingPointError("samples are not finite")
            path = self.path(step)
            grid = self._grid((images / 2 + 0.5).clip(0, 1))
            with self._writing:
                save_png(path, grid, metadata={"step": step, "seed": self._config.preview.seed})
            writer.write_image(step, "samples", grid)
            say(f"preview: {path} ({time.perf_counter() - started:.1f} s)")
            return path
        except Exception as error:
            self.failures += 1
            reason = " ".join(str(error).split())[:300]
            say(f"warning: the preview at step {step} failed, training goes on: {type(error).__name__}: {reason}")
            return None

    def _grid(self, images):
        captions = self._dataset.captions
        factor = automatic_enlargement(*images.shape[1:3]) // 2 or 1
        pictures = [enlarge_image(to_pil(image), factor) for image in images]
        labels = [caption.split()[-1] for caption in captions] * self._config.preview.per_caption
        return image_grid(pictures, columns=len(captions), labels=labels)
