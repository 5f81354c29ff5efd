"""``python -m train.benchmark``: seconds of a training step, pictures per second, and model FLOPs utilisation.

The step is the one that ``train.main`` compiles: forward, backward, gradient norm, clipping and AdamW, on a batch of
random latents and captions, without averaged weights. ``--against diffusers`` trains diffusers' network beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import load_preset
from configs.schema import ComputeConfig, EmaConfig, FlowConfig, OptimizerConfig, RunConfig
from kernels.benchmarking.flops import count_products
from kernels.benchmarking.roofline import Cost, roofline
from kernels.benchmarking.timing import compile_timed, random_like
from sana_jax.benchmarking import command
from sana_jax.benchmarking.command import BenchmarkConfig
from sana_jax.benchmarking.sides import Run, Setting, add_figures, measure_sides, row_of, rows
from sana_jax.command_line import parse
from sana_jax.errors import UserError, run_command_line
from sana_jax.models.sana import SanaConfig, SanaTransformer
from sana_jax.pipelines.families import abstract_params
from train.batch import Batch
from train.recipes import make_recipe
from train.state import TrainState

PROGRAM = "python -m train.benchmark"
LEARNING_RATE, CLIP_NORM = 1e-4, 1.0
BACKWARD_AND_FORWARD = 3  # a backward pass has two products for each of the forward's


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and a batch.

    Attributes:
        config: the network's shape.
        batch_size: pictures of a step.
        side: height and width of the latents.
        caption_tokens: length of the captions, half of which is padding.
        steps: that are timed at once, so that what the other side leaves behind does not count.
        remat: what the backward pass computes again.
        scan_blocks: whether the blocks are one loop, which compiles sooner; unrolled they are faster on a CPU.
    """

    config: SanaConfig
    batch_size: int
    side: int
    caption_tokens: int
    steps: int = 1
    remat: str = "none"
    scan_blocks: bool = False

    @property
    def tokens(self) -> int:
        """Of a picture."""
        return (self.side // self.config.patch_size) ** 2


_MEDIUM = SanaConfig(
    in_channels=32, out_channels=32, num_attention_heads=16, attention_head_dim=32, num_layers=8,
    num_cross_attention_heads=8, cross_attention_head_dim=64, cross_attention_dim=512, caption_channels=256,
    sample_size=16, patch_size=1, qk_norm="rms_norm_across_heads",
)  # fmt: skip
_WIDE = SanaConfig.sana_600m(sample_size=16, num_layers=4, qk_norm="rms_norm_across_heads", caption_channels=256)
CASES = {
    "tiny": Case(load_preset("digits").transformer, batch_size=64, side=8, caption_tokens=7, steps=10),
    "medium": Case(_MEDIUM, batch_size=4, side=16, caption_tokens=64),
    # four blocks of SANA 0.6B's width
    "wide": Case(_WIDE, batch_size=4, side=16, caption_tokens=64),
    "sana_600m": Case(SanaConfig.sana_600m(sample_size=16), 64, 16, 300, remat="full", scan_blocks=True),
    "sana_1600m": Case(SanaConfig.sana_1600m(), 16, 32, 300, remat="full", scan_blocks=True),
}
USUAL = {"cpu": ("tiny", "medium", "wide"), "gpu": ("sana_1600m", "sana_600m")}


def random_batch(case: Case) -> Batch:
    """Latents, captions and their masks, half of which is padding."""
    rng = np.random.default_rng(0)
    config, length = case.config, case.caption_tokens
    latents = rng.standard_normal((case.batch_size, case.side, case.side, config.in_channels), np.float32)
    embeds = rng.standard_normal((case.batch_size, length, config.caption_channels), np.float32)
    mask = np.broadcast_to(np.arange(length) < (length + 1) // 2, embeds.shape[:2]).astype(np.int32)
    return Batch(latents, embeds, mask, {})


def run_config(case: Case, dtype: str = "float32") -> RunConfig:
    """The digits preset with this network."""
    preset = load_preset("digits")
    data = dataclasses.replace(preset.data, embedding_dim=case.config.caption_channels)
    return dataclasses.replace(
        preset,
        transformer=case.config,
        data=data,
        batch_size=case.batch_size,
        compute=ComputeConfig(dtype=dtype, remat=case.remat, scan_blocks=case.scan_blocks),
        flow=FlowConfig(flow_shift=3.0, caption_dropout=0.0),
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE, schedule="constant", warmup_steps=0, clip_norm=CLIP_NORM
        ),
        ema=EmaConfig(enabled=False),
    )


def step_function(case: Case, dtype: str = "float32") -> tuple[Callable[[], Any], dict[str, float]]:
    """A function that trains ``case.steps`` steps and returns the loss; and what compiling took."""
    config = run_config(case, dtype)
    recipe, batch = make_recipe(config), jax.device_put(random_batch(case))
    params = random_like(jax.eval_shape(lambda: recipe.initialize(jax.random.key(0), None)))
    optimizer = recipe.optimizer(config, params)
    null = jnp.zeros((1, *batch.prompt_embeds.shape[1:])), jnp.ones((1, case.caption_tokens), jnp.int32)
    (step,) = recipe.step_functions(config, optimizer, null)
    state = TrainState(jnp.int32(0), params, None, optimizer.init(params))
    compiled, compilation = compile_timed(step, state, None, batch, donate=(0,))
    del params

    def run() -> Any:
        nonlocal state
        for _ in range(case.steps):
            state, metrics = compiled(state, None, batch)
        return metrics.loss

    return run, compilation


def forward_flops(case: Case) -> float:
    """Of the products of one forward pass of the batch."""
    network, batch = SanaTransformer(case.config), random_batch(case)

    def forward(params: Any, latents: Any, embeds: Any, mask: Any, timestep: Any) -> Any:
        return network.apply({"params": params}, latents, embeds, timestep, encoder_attention_mask=mask)

    timestep = jax.ShapeDtypeStruct((case.batch_size,), jnp.float32)
    arrays = batch.latents, batch.prompt_embeds, batch.prompt_attention_mask, timestep
    return count_products(forward, abstract_params(network), *arrays)


def train_case(name: str, batch_size: int | None, setting: Setting) -> list[dict[str, Any]]:
    """The rows of a case."""
    case = CASES[name]
    case = case if batch_size is None else dataclasses.replace(case, batch_size=batch_size)
    compilation: dict[str, float] = {}

    @contextlib.contextmanager
    def ours() -> Iterator[Run]:
        step, told = step_function(case, setting.dtype)
        compilation.update(told)

        def run() -> dict[str, float]:
            begin = time.perf_counter()
            jax.block_until_ready(step())
            return {"step": (time.perf_counter() - begin) / case.steps}

        yield run

    torch_case = {"kind": "train_step", "transformer": case.config.to_dict(), "batch": case.batch_size,
                  "side": case.side, "caption_tokens": case.caption_tokens, "remat": case.remat != "none"}  # fmt: skip
    samples = measure_sides(ours, torch_case, setting)
    shape = f"batch {case.batch_size}, {case.tokens} tokens, caption {case.caption_tokens}, remat {case.remat}"
    found = rows({"case": f"training step, {name}", "shape": shape, "dtype": setting.dtype}, samples)
    for implementation in samples:
        row = row_of(found, "step", implementation)
        add_figures(row, images__s=case.batch_size / row["median_s"])
        # the useful work: what remat computes again is not counted
        useful = Cost(BACKWARD_AND_FORWARD * forward_flops(case), 0.0, setting.dtype)
        share = roofline(useful, setting.peaks, row["median_s"])
        row["flops"] = share["flops"]
        add_figures(row, MFU=share["roofline_share"])
    row_of(found, "step").update(compilation)
    return found


@dataclasses.dataclass(frozen=True)
class TrainBenchmarkConfig(BenchmarkConfig):
    """Times training steps with random weights and data, and writes a table."""

    batch_size: int | None = None
    """Pictures of a step, in place of the case's own."""
    output: pathlib.Path = pathlib.Path("runs/benchmarks/train")
    """Where the report goes, as .json and .md."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size {self.batch_size} is not allowed; choose 1 or more, or leave it out")
        if self.size != "auto":
            raise UserError(
                f"size {self.size} is not for training, whose cases are of one size each: choose them by --cases "
                f"{' '.join(CASES)}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    config = parse(TrainBenchmarkConfig, argv, prog=PROGRAM)
    cases = {name: functools.partial(train_case, name, config.batch_size) for name in CASES}
    return command.run(config, PROGRAM, argv, cases, USUAL, sized=False)


if __name__ == "__main__":
    run_command_line(main)
