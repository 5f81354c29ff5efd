"""Trains a model: ``python -m train.main [PRESET] [--field.sub value ...]`` or ``python -m train.main --resume RUN_DIR``.

Read top to bottom: configuration, devices and mesh, data, model and state, compilation, restore, loop.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

import sana_jax
from configs import DEFAULT_PRESET, PRESETS, load_preset
from configs.schema import RunConfig
from configs.serialization import to_dict
from sana_jax.command_line import parse
from sana_jax.compilation import compile_ahead, enable_compilation_cache, readable_bytes
from sana_jax.devices import choose_device, prefer_device
from sana_jax.errors import UserError, run_command_line
from sana_jax.models.sana import SanaTransformer
from sana_jax.models.sharding_rules import SANA
from train import run_directory
from train.checkpoints import CheckpointStore
from train.data import Loader, make_dataset
from train.distributed import describe_processes, join_processes
from train.metrics import MetricsWriter, Progress, clock, summarise
from train.objectives.flow_matching import FlowMatching
from train.preemption import StopRequest, exit_status
from train.previews import Previewer
from train.sharding import batch_sharding, check_batch, local_rows, make_mesh, replicated, to_global
from train.state import TrainState, parameter_count, plan_state
from train.step import make_train_step

PROG = "python -m train.main"
# Steps that may be queued on the devices before the host waits for the oldest.
STEPS_IN_FLIGHT = 2


def read_command_line(argv: Sequence[str]) -> tuple[RunConfig, bool]:
    """The run that a command line describes, and whether it must exist already.

    Raises:
        UserError, FileNotFoundError: one line about what is wrong with it.
    """
    argv = list(argv)
    if argv and argv[0] == "--resume" or any(word.startswith("--resume=") for word in argv[:1]):
        head = argv.pop(0)
        run_dir = head.partition("=")[2] or (argv.pop(0) if argv and not argv[0].startswith("--") else "")
        if not run_dir:
            raise UserError(f"--resume has no value; it takes a run directory: {PROG} --resume runs/{DEFAULT_PRESET}")
        saved = run_directory.read_config(Path(run_dir))
        run_directory.require_checkpoint(Path(run_dir))
        saved = dataclasses.replace(saved, run_dir=run_dir)
        config = parse(RunConfig, argv, default=saved, prog=f"{PROG} --resume {run_dir}")
        if config.run_dir != run_dir:
            raise UserError(f"--run-dir {config.run_dir} with --resume {run_dir}: a run stays where it is; leave it out")
        return config, True
    if "--resume" in argv:
        raise UserError(f"--resume comes first: {PROG} --resume RUN_DIR [--field.sub value ...]")
    name = argv.pop(0) if argv and not argv[0].startswith("-") else DEFAULT_PRESET
    prog = f"{PROG} [{'|'.join(PRESETS)}]"
    config = parse(RunConfig, argv, default=load_preset(name), prog=prog)
    if config.preset != name:
        raise UserError(f"--preset {config.preset}: the preset is the first word, not an option: {PROG} {config.preset}")
    return config, False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    config, _ = read_command_line(sys.argv[1:] if argv is None else argv)
    stop = StopRequest()
    return train(config, stop)


def train(config: RunConfig, stop: StopRequest) -> int:
    """Trains, or continues, the run of ``config``; returns the exit status."""
    # ---- devices and mesh --------------------------------------------------------------------------------------------
    prefer_device(config.device)
    join_processes(config.distributed)
    choose_device(config.device)
    cache = enable_compilation_cache()
    is_first = jax.process_index() == 0
    say = (lambda line: print(line, flush=True)) if is_first else (lambda line: None)
    mesh = make_mesh(config.mesh)
    jax.set_mesh(mesh)
    check_batch(config.batch_size, config.accumulation, mesh)
    continuing = run_directory.claim(config)
    say(f"sana_jax {sana_jax.__version__}, jax {jax.__version__}: {describe_processes()}, {_mesh_text(mesh)}")
    say(f"run: {config.preset}, {config.steps} steps of {config.batch_size} in {config.run_dir}; compiled code: {cache}")

    # ---- data --------------------------------------------------------------------------------------------------------
    dataset = make_dataset(config.data)
    rows_sharding = batch_sharding(mesh)
    rows = local_rows(rows_sharding, config.batch_size)
    loader = Loader(dataset, seed=config.seed, batch_size=config.batch_size, rows=rows)
    say(f"data: {dataset.describe()}")

    # ---- model and state ---------------------------------------------------------------------------------------------
    compute = config.compute
    transformer = SanaTransformer(
        config.transformer, jnp.dtype(compute.dtype), remat=compute.remat, scan_blocks=compute.scan_blocks
    )
    plan = plan_state(config, transformer, SANA, mesh)
    say(
        f"model: {parameter_count(plan.abstract.params):,} parameters in {config.transformer.num_layers} blocks, "
        f"computed in {compute.dtype}, remat {compute.remat}"
    )
    if plan.whole and mesh.size > 1:
        say(f"sharding: {len(plan.whole)} parameters stay whole where an axis does not divide them: {plan.whole[0]} ...")
    null_embeds, null_mask = dataset.text_encoder.null_encoding()
    objective = FlowMatching(transformer, config.flow, jnp.asarray(null_embeds), jnp.asarray(null_mask))
    run_directory.write(config, dataset)

    # ---- compilation -------------------------------------------------------------------------------------------------
    step_function = jax.jit(
        make_train_step(objective, plan.optimizer, config),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, plan.abstract), replicated(mesh)),
    )
    first_batch = dataset.batch(jnp.zeros(config.batch_size, int))
    abstract_batch = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=rows_sharding), first_batch
    )
    shape = "x".join(map(str, first_batch.latents.shape))
    train_step = compile_ahead(f"the train step for latents {shape}", step_function, plan.abstract, abstract_batch, say=say)
    previewer = Previewer(config, dataset, transformer, mesh)
    sampled = plan.abstract.params if plan.abstract.ema is None else plan.abstract.ema
    if config.preview.every:
        previewer.compile(sampled, say)

    # ---- restore -----------------------------------------------------------------------------------------------------
    store = CheckpointStore(
        Path(config.run_dir) / "checkpoints",
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        asynchronous=config.checkpoint.asynchronous,
    )
    if continuing and store.latest_step() is not None:
        restored = store.restore(plan.abstract.params, plan.abstract.ema, plan.abstract.opt_state)
        loader.restore(restored.data_position)
        count = jax.device_put(jnp.asarray(restored.step, jnp.int32), replicated(mesh))
        state = TrainState(count, restored.params, restored.ema, restored.opt_state)
        say(f"resumed at step {restored.step} of {config.steps}")
    else:
        state = plan.initialize()
    run = Run(config, stop, store, loader, previewer, say)
    with store:
        return run.loop(state, train_step, lambda batch: to_global(batch, rows_sharding, config.batch_size, rows[0]))


class Run:
    """The loop and what happens along it: previews, rows, checkpoints, stopping."""

    def __init__(self, config, stop, store, loader, previewer, say):
        self.config, self.stop, self.store, self.loader = config, stop, store, loader
        self.previewer, self.say = previewer, say
        self.started = time.perf_counter()
        self.nonfinite = 0
        self.images_per_second: list[float] = []

    def loop(self, state: TrainState, train_step, to_devices) -> int:
        """Steps to the end, or to a request to stop; returns the exit status."""
        config, step = self.config, int(state.step)
        first = step
        self.writer = MetricsWriter(Path(config.run_dir), config.logging, to_dict(config), step)
        progress = self.progress = Progress(step, config.steps)
        self.say = progress.say
        if step == 0:
            self.preview(state, step)
        window, in_flight, window_started = [], deque(), time.perf_counter()
        try:
            while step < config.steps:
                batch = to_devices(next(self.loader))
                self.stop.nothing_to_lose = False
                state, metrics = train_step(state, batch)
                step += 1
                window.append(metrics)
                in_flight.append(metrics.loss)
                if len(in_flight) > STEPS_IN_FLIGHT:
                    in_flight.popleft().block_until_ready()
                progress.advance()

                at_row = step % config.logging.every == 0 or step == config.steps
                if at_row:
                    jax.block_until_ready(metrics)
                    self.row(step, window, time.perf_counter() - window_started)
                    window = []
                # Where there are several processes they ask one another at rows only.
                stopping = self.stop.agreed() if at_row or jax.process_count() == 1 else False
                pause = time.perf_counter()
                due = step % config.checkpoint.every == 0 or step == config.steps or stopping
                if due:
                    self.save(state, step)
                if self.previewer.due(step) and not stopping:
                    self.preview(state, step)
                    stopping = self.stop.agreed()
                    if stopping and not due:
                        self.save(state, step)
                progress.pause(time.perf_counter() - pause)
                if at_row:
                    window_started = time.perf_counter()
                else:
                    window_started += time.perf_counter() - pause
                if stopping:
                    self.store.wait()
                    progress.say(
                        f"stopped by {self.stop.signal.name} after step {step} of {config.steps}; everything is saved, "
                        f"continue with: {_python()} -m train.main --resume {config.run_dir}"
                    )
                    return exit_status(self.stop.signal)
            self.store.wait()
        finally:
            progress.close()
            self.writer.close()
        self.finish(first, step)
        return 0

    def row(self, step: int, window: list, seconds: float) -> None:
        """Writes and shows a row; deals with steps that were not finite."""
        values = summarise(window, len(window) * self.config.batch_size, seconds)
        self.writer.write(step, values)
        self.progress.row(step, values)
        if "images_per_second" in values:
            self.images_per_second.append(values["images_per_second"])
        bad = [step - len(window) + 1 + i for i, metrics in enumerate(window) if not bool(metrics.finite)]
        if not bad:
            return
        self.nonfinite += len(bad)
        what = f"loss {float(window[-1].loss):g}, gradient norm {float(window[-1].grad_norm):g}"
        newest = self.store.latest_step()
        if self.config.nonfinite == "error" or self.nonfinite > self.config.max_nonfinite:
            policy = "" if self.config.nonfinite == "error" else f", the {self.nonfinite}th (--max-nonfinite)"
            raise UserError(
                f"the loss or gradient is not finite at step {bad[0]}{policy} ({what} at step {step}); no such step "
                f"was applied, and the last checkpoint is "
                f"{'none' if newest is None else newest}: lower --optimizer.learning-rate, or leave such steps out "
                "with --nonfinite skip"
            )
        self.progress.say(f"warning: left out step {', '.join(map(str, bad))}, whose loss or gradient is not finite")

    def save(self, state: TrainState, step: int) -> None:
        """Saves the state unless it is saved already."""
        if self.store.latest_step() == step:
            return
        record = self.store.save(
            step,
            params=state.params,
            ema=state.ema,
            opt_state=state.opt_state,
            data_position=self.loader.position(),
            config=to_dict(self.config),
        )
        self.progress.say(
            f"checkpoint: {self.config.run_dir}/checkpoints/{step} ({readable_bytes(record.state_bytes)}, "
            f"training waited {record.blocked_seconds:.1f} s)"
        )

    def preview(self, state: TrainState, step: int) -> None:
        """Draws samples, if they are due."""
        if self.previewer.due(step):
            params = state.params if state.ema is None else state.ema
            self.previewer.draw(step, params, self.writer, self.progress.say)

    def finish(self, first: int, step: int) -> None:
        """The last lines of a run."""
        config, seconds = self.config, time.perf_counter() - self.started
        notes = []
        if self.nonfinite:
            notes.append(f"{self.nonfinite} steps left out (not finite)")
        if self.previewer.failures:
            notes.append(f"{self.previewer.failures} previews failed")
        if self.writer.failures:
            notes.append(f"no longer logging to {', '.join(dict.fromkeys(self.writer.failures))}")
        if first == step:
            self.say(f"nothing left to do: {config.run_dir} is at step {step} of {config.steps}; more with --steps N")
        else:
            speed = sorted(self.images_per_second)[len(self.images_per_second) // 2]
            self.say(
                f"trained {step - first} steps in {clock(seconds)}, median {speed:.0f} images/s"
                + "".join(f"; {note}" for note in notes)
            )
        prompt = self.previewer.example_prompt
        self.say(
            f"everything is in {config.run_dir} (pictures in {config.run_dir}/samples); draw one with:\n"
            f'  {_python()} -m sana_jax.generate --model {config.run_dir} --prompt "{prompt}" --out picture.png'
        )


def _mesh_text(mesh) -> str:
    cut = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
    return "mesh " + (", ".join(cut) if cut else "of one device")


def _python() -> str:
    """The interpreter as the user would type it."""
    relative = os.path.relpath(sys.executable)
    return relative if not relative.startswith("..") else sys.executable


if __name__ == "__main__":
    run_command_line(main)
