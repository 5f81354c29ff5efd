"""Trains a model: ``python -m train.main [PRESET] [--field.sub value ...]`` or ``... --resume RUN_DIR``.

Read top to bottom: configuration, devices and mesh, data, model and state, compilation, restore, loop.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds, so that a signal finds someone listening
    from train.preemption import StopRequest

    STOP = StopRequest()

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import sana_jax
from configs import DEFAULT_PRESET, load_preset
from configs.schema import DistributedConfig, RunConfig
from configs.serialization import to_dict
from configs.unread import check_unread
from kernels.typing import PyTree
from sana_jax.command_line import parse
from sana_jax.compilation import compile_ahead, enable_compilation_cache, readable_bytes
from sana_jax.devices import choose_device, prefer_device, using_kernels
from sana_jax.errors import UserError, run_command_line
from sana_jax.host_memory import keep_freed_memory
from sana_jax.weights.components import Resident
from train import run_directory
from train.assembly import RunParts, assemble, open_base, open_start
from train.base_model import BaseModel, contract_notice, in_dtype
from train.batch import Batch
from train.checkpoints import CheckpointStore
from train.data import Loader
from train.data.loader import batch_rows, own_rows
from train.distributed import Preparation, agree_on_options, describe_processes, join_processes
from train.fake_score_start import FAKE, FakeScoreStart, open_fake_score_start
from train.longsana_step import STREAM
from train.memory import advice_when_memory_ends
from train.metrics import MetricsWriter, Progress, clock, summarise
from train.optimizers import learning_rate_schedule, warmup_steps
from train.phases import schedules_of
from train.plan import needed_and_choices, plan_words, print_plan
from train.preemption import StopRequest, exit_status
from train.previews import Previewer
from train.publishing import publish
from train.recipes import Recipe, make_recipe
from train.sharding import batch_sharding, check_batch, local_rows, make_mesh, replicated, to_global
from train.state import TrainState, parameter_count, sampled_params
from train.state_plan import StatePlan, plan_state
from train.step import StepMetrics
from train.trained_table import trained_count, trained_table
from train.usage import OPTIONS_OF_TRAINING, TRAINING, about_preset, overview, where_else
from train.validation import Validator

PROG = "python -m train.main"
# Steps that may be queued on the devices before the host waits for the oldest.
STEPS_IN_FLIGHT = 2


def read_command_line(argv: Sequence[str], prog: str = PROG, help_text: Callable[[], str] | None = None) -> RunConfig:
    """The run that a command line describes. ``--help`` alone prints the presets and leaves with status 0.

    Args:
        argv: the words.
        prog: the command, for messages.
        help_text: of ``--help`` alone, where the command is not this one.

    Raises:
        UserError, FileNotFoundError: one line about what is wrong with it.
    """
    argv = list(argv)
    if argv and argv[0] in ("-h", "--help"):
        print(overview(prog, TRAINING, OPTIONS_OF_TRAINING) if help_text is None else help_text())
        raise SystemExit(0)
    if argv and argv[0].partition("=")[0] == "--resume":
        head = argv.pop(0)
        run_dir = head.partition("=")[2] or (argv.pop(0) if argv and not argv[0].startswith("--") else "")
        if not run_dir:
            raise UserError(f"--resume has no value; it takes a run directory: {prog} --resume runs/{DEFAULT_PRESET}")
        saved = run_directory.read_config(Path(run_dir))
        run_directory.require_checkpoint(Path(run_dir))
        # Which processes there are belongs to a start, not to the run: other hosts may continue it.
        saved = dataclasses.replace(saved, run_dir=run_dir, distributed=DistributedConfig())
        saved = run_directory.located(saved, Path(run_dir))
        config = parse(
            RunConfig, argv, default=saved, prog=f"{prog} --resume {run_dir}", elsewhere=where_else(saved.preset)
        )
        if config.run_dir != run_dir:
            raise UserError(
                f"--run-dir {config.run_dir} with --resume {run_dir}: a run stays where it is; leave --run-dir out"
            )
        check_unread(config, saved)
        return config
    if any(word.partition("=")[0] == "--resume" for word in argv):
        raise UserError(f"--resume comes first: {prog} --resume RUN_DIR [--field.sub value ...]")
    name = argv.pop(0) if argv and not argv[0].startswith("-") else DEFAULT_PRESET
    config = parse(
        RunConfig,
        argv,
        default=load_preset(name),
        prog=f"{prog} {name}",
        description=f"{about_preset(name)} {prog} --help lists the presets" + (" and --plan." if prog == PROG else "."),
        elsewhere=where_else(name),
    )
    if config.preset != name:
        raise UserError(
            f"--preset {config.preset}: the preset is the first word, not an option: {prog} {config.preset}"
        )
    check_unread(config, load_preset(name))
    return config


def main(argv: Sequence[str] | None = None, stop: StopRequest | None = None) -> int:
    """Runs the command; returns its exit status. Without ``stop`` it listens to signals itself, until it returns."""
    words = list(sys.argv[1:] if argv is None else argv)
    others, planned, target = plan_words(words)
    config = read_command_line(others)
    if planned:
        return print_plan(config, words, _print_line, target)
    if stop is not None:
        return train(config, stop)
    with closing(StopRequest()) as stop:
        return train(config, stop)


def train(config: RunConfig, stop: StopRequest) -> int:
    """Trains, or continues, the run of ``config``; returns the exit status."""
    keep_freed_memory(config.device)
    with ExitStack() as held:
        return _train(config, stop, held)


def _train(config: RunConfig, stop: StopRequest, held: ExitStack) -> int:
    mesh, preparation, say = _set_up(config, stop, held)

    # ---- what is trained, on what ------------------------------------------------------------------------------------
    rows_sharding = batch_sharding(mesh)
    rows = local_rows(rows_sharding, config.batch_size)
    config, base = open_base(config)
    continuing = run_directory.claim(config, base)
    if continuing:
        held.enter_context(run_directory.hold(config))
    begun = run_directory.has_checkpoint(Path(config.run_dir))
    outline = make_recipe(config)
    base_weights = _weights_to_read(config, outline, base, mesh, begun)
    start, fake = (None, None) if begun else (open_start(config), open_fake_score_start(config))
    # Layers and patterns that are not there are found before the pictures are prepared, which may take hours.
    plan = plan_state(config, outline, base_weights, mesh)
    parts = assemble(config, base, say, stop)
    if parts is None:
        return exit_status(stop.signal)
    dataset, recipe = parts.dataset, parts.recipe
    if config.self_forcing is not None and config.self_forcing.stream is not None:  # its state is shaped by the data
        plan = plan_state(config, recipe, base_weights, mesh)
    loader = Loader(dataset, seed=config.seed, batch_size=config.batch_size, rows=rows)
    say(f"data: {dataset.describe()}")
    run_directory.check_parts(parts)

    # ---- model and state ---------------------------------------------------------------------------------------------
    frozen = recipe.frozen(in_dtype(base_weights, config.compute.dtype), mesh)
    _say_what_is_trained(parts, plan, base_weights, mesh, say)
    previewer, validator = Previewer(parts, mesh, stop.writing), Validator(parts, mesh)
    store = _open_store(config)
    run = Run(parts, stop, store, loader, previewer, validator, say)
    newest = store.latest_step()
    preparation.agree(dataset, newest, *(model and model.weights_id for model in (base, start)))
    if newest is not None and newest >= config.steps and not previewer.missing(newest):
        run.finish(newest, newest)
        return 0
    store.check_space(plan.abstract.params, plan.abstract.ema, plan.abstract.opt_state)

    # ---- compilation -------------------------------------------------------------------------------------------------
    train_steps = {}
    held.enter_context(advice_when_memory_ends(lambda: needed_and_choices(parts, mesh, train_steps.values())))
    kinds = _compile_steps(train_steps, parts, plan, frozen, mesh, say)
    if config.preview.every:
        previewer.compile(sampled_params(plan.abstract), frozen, say)
    if config.validation.every:
        validator.compile(sampled_params(plan.abstract), frozen, say)

    # ---- restore -----------------------------------------------------------------------------------------------------
    weights = None if base is None else base.weights(base_weights)
    if newest is not None:
        state, run.nonfinite = _restore(config, store, plan, loader, say)
    else:
        if continuing:
            say(f"{config.run_dir} has no checkpoint yet: starting at step 0")
        state = _first_state(plan, base_weights, weights, start, fake, say)
    frozen = recipe.frozen(in_dtype(weights.take(), config.compute.dtype), mesh) if recipe.keeps_base else None
    if weights is not None and not recipe.keeps_base:
        weights.free()
    with stop.writing:
        if not continuing:
            held.enter_context(run_directory.hold(config))
        run_directory.write(parts)

    # ---- loop --------------------------------------------------------------------------------------------------------
    def train_step(state: TrainState, batch: Batch, step: int) -> tuple[TrainState, StepMetrics]:
        return train_steps[batch.latents.shape[1:], step % kinds](state, frozen, batch)

    def to_devices(batch: Batch) -> Batch:
        total = config.batch_size * (len(batch.latents) // (rows[1] - rows[0]))  # more where there are pictures
        return to_global(batch, rows_sharding, total, own_rows(rows, config.batch_size, total).start)

    with store:
        status = run.loop(state, frozen, train_step, to_devices)
    stop.nothing_to_lose = True
    return status


def _set_up(config: RunConfig, stop: StopRequest, held: ExitStack) -> tuple[Mesh, Preparation, Callable[[str], None]]:
    """Devices, processes and their mesh, what they agree in, and what prints lines."""
    prefer_device(config.device)
    join_processes(config.distributed)
    stop.listen()  # joining gives SIGTERM to JAX
    device = choose_device(config.device)
    agree_on_options(config)
    preparation = held.enter_context(Preparation())
    cache = enable_compilation_cache()
    say = _print_line if jax.process_index() == 0 else (lambda line: None)
    held.enter_context(jax.set_mesh(mesh := make_mesh(config.mesh)))
    held.enter_context(using_kernels(config.compute.kernels, device, "--compute.kernels"))
    check_batch(config.batch_size, config.accumulation, mesh)
    run_directory.check_writable(config)
    say(f"sana_jax {sana_jax.__version__}, jax {jax.__version__}: {describe_processes()}, {_mesh_text(mesh)}")
    say(f"run: {config.preset}, {config.steps} steps of {config.batch_size} in {config.run_dir}; compiled code {cache}")
    return mesh, preparation, say


def _weights_to_read(
    config: RunConfig, recipe: Recipe, base: BaseModel | None, mesh: Mesh, begun: bool
) -> PyTree | None:
    """Shapes of the base model's parameters: float32 where the trained ones begin as these, so that no bit is lost, and
    the compute dtype where they only stay beside them."""
    dtype = "float32" if recipe.copies_base and not begun else config.compute.dtype
    return None if base is None else base.abstract_weights(mesh, dtype)


def _compile_steps(
    compiled: dict, parts: RunParts, plan: StatePlan, frozen: PyTree | None, mesh: Mesh, say: Callable[[str], None]
) -> int:
    """Fills ``compiled`` with a step by (shape of latents, number in the cycle), and returns the cycle's length."""
    config, dataset, sharding = parts.config, parts.dataset, batch_sharding(mesh)
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, plan.abstract), replicated(mesh))
    null_encoding = tuple(map(jnp.asarray, dataset.null_encoding()))
    functions = parts.recipe.step_functions(config, plan.optimizer, null_encoding)
    distinct = list(dict.fromkeys(functions))
    for shape, indices in dataset.buckets.items():
        rows = batch_rows(dataset, shape, config.batch_size)
        batch = dataset.batch(np.full(rows, indices[0]), np.zeros((rows, 2)))
        batch = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), batch)
        programs = {}
        for number, function in enumerate(distinct):
            which = "the train step" if len(distinct) == 1 else f"train step {number + 1} of {len(distinct)}"
            name = f"{which} for latents {'x'.join(map(str, (rows, *shape)))}"
            jitted = jax.jit(function, donate_argnums=0, out_shardings=shardings)
            programs[function] = compile_ahead(name, jitted, plan.abstract, frozen, batch, say=say)
        compiled |= {(shape, kind): programs[function] for kind, function in enumerate(functions)}
    return len(functions)


def _first_state(
    plan: StatePlan,
    abstract_base: PyTree | None,
    base: Resident | None,
    start: BaseModel | None,
    fake: FakeScoreStart | None,
    say: Callable[[str], None],
) -> TrainState:
    """The state of step 0; the sampled network and the fake score begin as ``start`` and ``fake``, where these are not
    the base model."""
    initialize = compile_ahead("the first state", plan.initialize, abstract_base, say=say)
    state = initialize(None if base is None else base.params)
    if fake is None and start is None:
        return state
    state = state._replace(opt_state=None)  # that of the base model's parameters
    if fake is not None:
        state = state._replace(params={**state.params, FAKE: fake.weights(plan.abstract.params[FAKE])})
        say(f"the fake score begins as that of {fake.directory}")
    if start is not None:
        own = start.weights(plan.abstract.params["transformer"]).params
        say(f"the generator begins as {start.name}")
        # of copies, since the step's buffers are donated
        params, ema = ({**tree, "transformer": jax.tree.map(jnp.copy, own)} for tree in (state.params, state.ema or {}))
        state = state._replace(params=params, ema=None if state.ema is None else ema)
    return state._replace(opt_state=_optimizer_state(plan, state.params, say))


def _optimizer_state(plan: StatePlan, params: PyTree, say: Callable[[str], None]) -> PyTree:
    """The optimizers' state of step 0 of these parameters: some remember where they begin (Prodigy, schedule-free)."""

    def init(params: PyTree) -> PyTree:
        return plan.optimizer.init(jax.tree.map(jnp.copy, params))  # of copies, since both are donated to the step

    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract.opt_state)
    jitted = jax.jit(init, out_shardings=shardings)
    return compile_ahead("the optimizer's first state", jitted, plan.abstract.params, say=say)(params)


def _say_what_is_trained(
    parts: RunParts, plan: StatePlan, base: PyTree | None, mesh: Mesh, say: Callable[[str], None]
) -> None:
    """The lines of a run's start about the model."""
    config, optimizer = parts.config, parts.config.optimizer
    say(_model_line(config, plan, base))
    for notice in (contract_notice(config, parts.base), run_directory.computed_otherwise(config)):
        if notice is not None:
            say(notice)
    schedules = schedules_of(plan.optimizer, config)
    for line in (*parts.recipe.notes(optimizer.learning_rate, base), *trained_table(schedules, plan.abstract.params)):
        say(line)
    for name, _, options, steps in schedules:
        if (warmup := warmup_steps(options, steps)) != options.warmup_steps:
            whose = "the run has" if name is None else f"of the run's {config.steps} the {name} has"
            say(f"warm-up: {warmup} steps, not {options.warmup_steps}, since {whose} {steps} steps")
    if plan.whole and mesh.size > 1:
        say(f"sharding: {len(plan.whole)} parameters stay whole where no axis divides them: {plan.whole[0]} ...")


def _model_line(config: RunConfig, plan: StatePlan, base: PyTree | None) -> str:
    params = {name: tree for name, tree in plan.abstract.params.items() if name != STREAM}
    count, trained = parameter_count(params), trained_count(schedules_of(plan.optimizer, config), params)
    computed = f"computed in {config.compute.dtype}, remat {config.compute.remat}"
    blocks = f"{config.transformer.num_layers} blocks"
    if base is None:
        share = "" if trained == count else f", of them {trained:,} trained"
        return f"model: {count:,} parameters in {blocks}{share}, {computed}"
    whole = parameter_count(base)
    some = f", of them {trained:,} trained ({100 * trained / whole:.2f} % of the base model's)"
    share = "" if trained == whole else some
    if count > whole:
        share = f"; {trained:,} trained, a copy of them included"
    return f"model: {config.model}, {whole:,} parameters in {blocks}{share}, {computed}"


class Run:
    """The loop and what happens along it: previews, rows, checkpoints, stopping."""

    def __init__(
        self,
        parts: RunParts,
        stop: StopRequest,
        store: CheckpointStore,
        loader: Loader,
        previewer: Previewer,
        validator: Validator,
        say: Callable[[str], None],
    ):
        self.parts, self.config, self.stop, self.store, self.loader = parts, parts.config, stop, store, loader
        self.previewer, self.validator, self.say = previewer, validator, say
        self.writer: MetricsWriter | None = None
        self.progress: Progress | None = None
        self.started = time.perf_counter()
        self.nonfinite = 0
        self.unchecked: list[tuple[int, StepMetrics]] = []
        self.kind = "clips" if self.config.trains_on_clips else "images"
        self.samples_per_second: list[float] = []
        self.waited, self.samples = 0.0, 0  # seconds for data, and what was trained on, since the last row

    def loop(self, state: TrainState, frozen: PyTree | None, train_step, to_devices) -> int:
        """Steps to the end, or to a request to stop; returns the exit status.

        ``frozen`` are the base model's parameters, where the recipe keeps them: previews and validation read them.
        """
        self.started = time.perf_counter()
        config, step = self.config, int(state.step)
        first = step
        self.writer = MetricsWriter(Path(config.run_dir), config.logging, to_dict(config), step, self.stop.writing)
        progress = self.progress = Progress(step, config.steps, self.kind)
        self.say = progress.say
        if self.previewer.missing(step):  # at step 0, or where the run was interrupted before it
            self.preview(state, frozen, step)
        window, in_flight, window_started = [], deque(), time.perf_counter()
        try:
            while step < config.steps:
                asked = time.perf_counter()
                batch = next(self.loader)
                self.waited += time.perf_counter() - asked
                batch = to_devices(batch)
                self.samples += len(batch.latents)
                self.stop.nothing_to_lose = False
                state, metrics = train_step(state, batch, step)
                step += 1
                window.append(metrics)
                self.unchecked.append((step, metrics))
                in_flight.append(metrics.loss)
                if len(in_flight) > STEPS_IN_FLIGHT:
                    in_flight.popleft().block_until_ready()
                progress.advance()

                validates = self.validator.due(step)
                at_row = step % config.logging.every == 0 or step == config.steps or validates
                if at_row:
                    jax.block_until_ready(metrics)
                    seconds, measuring = time.perf_counter() - window_started, time.perf_counter()
                    validation = self.validator.measure(sampled_params(state), frozen) if validates else {}
                    progress.pause(time.perf_counter() - measuring)
                    self.row(step, window, seconds, validation)
                    window = []
                # Where there are several processes they ask one another at rows only.
                asks = at_row or jax.process_count() == 1
                stopping = asks and self.stop.agreed()
                pause = time.perf_counter()
                due = step % config.checkpoint.every == 0 or step == config.steps or stopping
                if at_row or due:
                    self.check_finite()
                if due:
                    self.save(state, step)
                if not stopping:
                    if self.previewer.due(step):
                        self.preview(state, frozen, step)
                    stopping = asks and self.stop.agreed()  # it may have come during the save or the preview
                    if stopping and not due:
                        self.check_finite()
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
                        f"continue with: {_python()} -m train.main --resume {shlex.quote(config.run_dir)}"
                    )
                    return exit_status(self.stop.signal)
            self.store.wait()
            with self.stop.writing:  # once more, with the last preview in its card
                publish(self.parts, sampled_params(state), step, self.previewer.newest)
        finally:
            progress.close()
            self.writer.close()
        self.finish(first, step)
        return 0

    def row(self, step: int, window: list[StepMetrics], seconds: float, validation: dict[str, float]) -> None:
        """Writes and shows a row, with the validation losses where they were measured."""
        values = summarise(window, self.samples, seconds, self.kind)
        values |= validation | {"data_wait_share": self.waited / seconds}
        self.waited, self.samples = 0.0, 0
        self.writer.write(step, values)
        self.progress.row(step, values)
        if validation:
            self.say(f"validation loss {validation['validation_loss']:.4f} at step {step}")
        if (speed := values.get(f"{self.kind}_per_second")) is not None:
            self.samples_per_second.append(speed)

    def check_finite(self) -> None:
        """Stops at steps that were not finite, or says that they were left out. Before every save.

        Raises:
            UserError: there was one, or more of them than may be left out.
        """
        bad = [(step, metrics) for step, metrics in self.unchecked if not bool(metrics.finite)]
        self.unchecked = []
        if not bad:
            return
        config, self.nonfinite = self.config, self.nonfinite + len(bad)
        step, metrics = bad[0]
        what = f"loss {float(metrics.loss):g}, gradient norm {float(metrics.grad_norm):g}"
        if config.nonfinite == "skip" and self.nonfinite <= config.max_nonfinite:
            steps = ", ".join(str(step) for step, _ in bad)
            self.say(f"warning: left out step {steps}: loss or gradient not finite (at {step}: {what})")
            return
        self.store.wait()
        newest = self.store.latest_step()
        if config.nonfinite == "skip":
            allowed = f"{self.nonfinite} steps by now, --max-nonfinite allows {config.max_nonfinite}"
            advice = "allow more of them"
        else:
            allowed, advice = "--nonfinite error allows none", "leave such steps out with --nonfinite skip"
        raise UserError(
            f"the loss or gradient at step {step} is not finite ({what}; {allowed}) and was not applied; "
            + ("no checkpoint was saved yet: " if newest is None else f"checkpoint {newest} is good: resume it and ")
            + f"{advice}, or start another --run-dir with a lower --optimizer.learning-rate than "
            f"{config.optimizer.learning_rate:g}"
        )

    def save(self, state: TrainState, step: int) -> None:
        """Saves the state."""
        record = self.store.save(
            step,
            params=state.params,
            ema=state.ema,
            opt_state=state.opt_state,
            data_position=self.loader.position(),
            config=to_dict(self.config),
            left_out=self.nonfinite,
        )
        self.progress.say(
            f"checkpoint: {self.config.run_dir}/checkpoints/{step} ({readable_bytes(record.state_bytes)}, "
            f"training waited {record.blocked_seconds:.1f} s)"
        )
        with self.stop.writing:
            publish(self.parts, sampled_params(state), step, self.previewer.newest)

    def preview(self, state: TrainState, frozen: PyTree | None, step: int) -> None:
        """Draws samples."""
        self.previewer.draw(step, sampled_params(state), frozen, self.writer, self.progress.say)

    def finish(self, first: int, step: int) -> None:
        """The last lines of a run."""
        config = self.config
        notes = []
        if self.nonfinite:
            notes.append(f"steps left out, not finite: {self.nonfinite}")
        if self.previewer.failures:
            notes.append(f"previews that failed: {self.previewer.failures}")
        if self.writer is not None and self.writer.failures:
            notes.append(f"no longer logging to {', '.join(dict.fromkeys(self.writer.failures))}")
        if first == step:
            notes.insert(0, "train on with a larger --steps")
            self.say(
                f"nothing left to do: {config.run_dir} is at step {step} of {config.steps}"
                + "".join(f"; {note}" for note in notes)
            )
        else:
            speed = sorted(self.samples_per_second)[len(self.samples_per_second) // 2]
            seconds = time.perf_counter() - self.started
            self.say(
                f"trained {step - first} steps in {clock(seconds)}, median {speed:.0f} {self.kind}/s"
                + "".join(f"; {note}" for note in notes)
            )
        model, example = shlex.quote(config.run_dir), self.previewer.example_prompt
        prompt = shlex.quote(example) if example.strip() else "TEXT"  # of samples without captions
        control = " --control-image PICTURE" if self.parts.recipe.kind == "controlnet" else ""
        if self.config.trains_a_world:
            control = f" --image PICTURE --action w-{self.parts.frames - 1}"
        elif self.parts.recipe.kind == "lora":
            control = "".join(f" --condition {name}=VALUE" for name in self.parts.recipe.conditions)
        control += " --emulate-fp16-saturation" if config.compute.emulate_fp16_saturation else ""
        what, out = ("clips", "clip.gif") if config.trains_on_clips else ("pictures", "picture.png")
        out = "clip.mp4" if config.few_steps is not None else out  # which grows block by block
        samples = f" ({what} in {config.run_dir}/samples)" if config.preview.every else ""
        self.say(
            f"everything is in {config.run_dir}{samples}; draw one with:\n"
            f"  {_python()} -m sana_jax.generate --model {model} --prompt {prompt}{control} --out {out}"
        )


def _open_store(config: RunConfig) -> CheckpointStore:
    directory, kept = Path(config.run_dir) / "checkpoints", config.checkpoint
    return CheckpointStore(
        directory, keep_last=kept.keep_last, keep_every=kept.keep_every, asynchronous=kept.asynchronous
    )


def _restore(
    config: RunConfig, store: CheckpointStore, plan: StatePlan, loader: Loader, say: Callable[[str], None]
) -> tuple[TrainState, int]:
    """The newest checkpoint, with the loader set to its place in the data, and how many steps it had left out."""
    restored = store.restore(plan.abstract.params, plan.abstract.ema, plan.abstract.opt_state)
    loader.restore(restored.data_position)
    say(f"resumed at step {restored.step} of {config.steps}")
    before = dataclasses.replace(config, steps=restored.config["steps"])
    recipe = make_recipe(config)
    made = (plan.optimizer, recipe.optimizer(before, plan.abstract.params))
    for new, old in zip(*(schedules_of(*each) for each in zip(made, (config, before)))):
        done = restored.step * new.steps // config.steps  # of this kind
        now, then = (float(learning_rate_schedule(new.options, each.steps)(done)) for each in (new, old))
        if then != now:
            whose = "" if new.name is None else f" of the {new.name}"
            say(
                f"--steps {config.steps} instead of {before.steps} stretches the {new.options.schedule} schedule: the "
                f"learning rate{whose} here is {now:.3g}, where it would have been {then:.3g}"
            )
    step = jax.device_put(jnp.asarray(restored.step, jnp.int32), plan.abstract.step.sharding)
    return TrainState(step, restored.params, restored.ema, restored.opt_state), restored.left_out


def _print_line(line: str) -> None:
    print(line, flush=True)


def _mesh_text(mesh) -> str:
    cut = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
    return "mesh " + (", ".join(cut) if cut else "of one device")


def _python() -> str:
    """The interpreter as the user would type it."""
    relative = os.path.relpath(sys.executable)
    return relative if not relative.startswith("..") else sys.executable


if __name__ == "__main__":
    run_command_line(lambda: main(stop=STOP))
