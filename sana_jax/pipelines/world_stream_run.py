"""One world while it is streamed: three stages with a state each, chunk after chunk, and a file that grows.

A chunk is a causal block of the first stage. The device is given the next chunk before the host waits for the one at
hand, whose frames another thread fetches and writes; so device, encoder and disk work at the same time, with two chunks
in memory.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, PyTree
from sana_jax.autoencoders.base import pixel_frames
from sana_jax.compilation import readable_bytes
from sana_jax.diffusion.samplers import Schedule
from sana_jax.diffusion.samplers.world_refiner import RefinerSampler
from sana_jax.errors import counted
from sana_jax.models.sana_wm_state import SanaWMState
from sana_jax.pipelines.base import OutputType, Size, Stopwatch
from sana_jax.pipelines.checks import as_numbers, not_finite
from sana_jax.pipelines.growing_output import GrowingOutput, frames_to_keep, shown_in_unit_range
from sana_jax.pipelines.residency import AUTOENCODER, TEXT, TRANSFORMER
from sana_jax.pipelines.sampling_function import Encoded
from sana_jax.pipelines.video_base import VideoRequest
from sana_jax.pipelines.world_inputs import WorldView
from sana_jax.pipelines.world_refiner import SanaWMRefiner
from sana_jax.pipelines.world_refiner_run import RefinedBlock, RefinerRun, goes_on
from sana_jax.pipelines.world_stream_folder import StreamFolder

if TYPE_CHECKING:
    from sana_jax.pipelines.world_stream import SanaWMStreamingPipeline

BlockEndCallback = Callable[["SanaWMStreamingPipeline", int, dict[str, Any]], Any]
STAGES = ("denoise", "refine", "decode", "write")
_START = 2**31 + 4  # apart from the noise of other pipelines
_KINDS = ("latents", "refined")  # of blocks that are kept


@dataclasses.dataclass(frozen=True)
class StreamedChunk:
    """What was measured of a chunk.

    Attributes:
        latent_frames: its first latent frame, and its end.
        frames: of pixels that came with it.
        seconds: from the end of the chunk before to its own, without compiling.
        stages: seconds from one result to the next: denoise, refine, decode, write. Writing runs beside the next
            chunk, so that its share is not in that chunk's ``seconds`` unless it is the slowest.
        state_bytes: of what each stage remembers after it: denoise, refine, decode.
    """

    latent_frames: tuple[int, int]
    frames: int
    seconds: float
    stages: Mapping[str, float]
    state_bytes: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class SanaWMStreamingPipelineOutput:
    """What a call has made.

    Attributes:
        frames: None with an ``output_path``, or where a callback ended it before there were any; else a list of one
            video, a list of PIL images; an array (1, F, H, W, 3) in [0, 1]; or latents (1, C, T, h, w), as asked for.
            Refined frames are without those that anchor them, refined latents with the sink.
        path: the file or folder that was written.
        frame_count: frames of the video so far.
        finished: whether it is whole; False where a callback ended it.
        c2w: the camera-to-world matrix of each of these frames; of all frames where they are latents.
        fps: frames per second at which they are to be shown.
        chunks: what was measured of every chunk that was made now.
        compile_seconds: of the transformers' programs; 0 where they were compiled before.
        sampling_seconds: of everything after the text.
        device_bytes: what the program of the later blocks holds on the device; None where that is not known.
        seconds: of each stage: text, encode, and those of the chunks together.
        sampled_size: height and width in pixels.
    """

    frames: Any
    path: pathlib.Path | None
    frame_count: int
    finished: bool
    c2w: Float[np.ndarray, "F 4 4"]
    fps: float
    chunks: tuple[StreamedChunk, ...]
    compile_seconds: float
    sampling_seconds: float
    device_bytes: int | None
    seconds: Mapping[str, float]
    sampled_size: tuple[int, int]


class RefinerPart(NamedTuple):
    """The second stage of a call.

    Attributes:
        refiner: the pipeline.
        sampler: how the video is cut for it.
        noise: (block, frames of it) -> its noise.
        prompt: what the video shows; None where there are embeddings.
        prompt_embeds: the same, encoded; None where there is a text.
    """

    refiner: SanaWMRefiner
    sampler: RefinerSampler
    noise: Callable[[int, int], Float[Array, "B T H W C"]]
    prompt: str | None
    prompt_embeds: Any


class StreamPlan(NamedTuple):
    """A call, after a look at all of it.

    Attributes:
        request: what it shares with the calls of other pipelines.
        starts: first latent frame of every chunk, and the end.
        size: of the video.
        poses: of every frame.
        view: the image and the camera at that size.
        fps: frames per second.
        schedule: the steps of a chunk.
        given: the noise, where it is not the seed's.
        state: the first stage's state before the first chunk, as shapes or made: a function without arguments.
        refining: the second stage, if there is one.
        temporal_factor: frames that a latent frame but the first stands for.
    """

    request: VideoRequest
    starts: tuple[int, ...]
    size: Size
    poses: Float[np.ndarray, "F 4 4"]
    view: WorldView
    fps: float
    schedule: Schedule
    given: Float[np.ndarray, "1 T h w C"] | None
    state: Callable[[], SanaWMState]
    refining: RefinerPart | None
    temporal_factor: int

    @property
    def chunks(self) -> int:
        """Their number."""
        return len(self.starts) - 1

    @property
    def hidden_frames(self) -> int:
        """First frames of pixels that are not shown: those that anchor a refiner."""
        return 0 if self.refining is None else self.refining.sampler.sink_frames

    @property
    def drawn(self) -> tuple[int, ...]:
        """The latent frames at which a part ends that is decoded at once; 0 before the first."""
        if self.refining is None:
            return self.starts
        return (0, *(end for _, end in self.refining.sampler.blocks(self.starts[-1])))

    def drawn_with(self, chunk: int) -> range:
        """The parts that can be decoded once a chunk is there, counted from 0."""
        ends = self.drawn[1:]
        return range(*(sum(end <= self.starts[place] for end in ends) for place in (chunk, chunk + 1)))

    def frames_of(self, parts: int) -> int:
        """Frames of pixels of so many parts from the first on."""
        return pixel_frames(self.drawn[parts], self.temporal_factor) - self.hidden_frames if parts else 0

    @property
    def frames(self) -> int:
        """Of the whole video."""
        return self.frames_of(len(self.drawn) - 1)


class _Dispatched(NamedTuple):
    """A chunk that the device is at work on; the arrays may still be coming."""

    chunk: int
    latents: Float[Array, "1 T h w C"]
    latents_kept: bool
    refined: tuple[RefinedBlock, ...]
    parts: tuple[tuple[int, Float[Array, "1 F H W P"]], ...]
    state_bytes: dict[str, int]
    begin: float

    @property
    def is_new(self) -> bool:
        """Whether any of it had to be made."""
        return not (self.latents_kept and all(block.was_kept for block in self.refined))


class _Delivered(NamedTuple):
    """What a callback is shown of a chunk, and what was measured."""

    shown: dict[str, Any]
    measured: StreamedChunk | None


class WorldStreamRun:
    """One world while it is made."""

    def __init__(
        self,
        pipeline: SanaWMStreamingPipeline,
        plan: StreamPlan,
        folder: StreamFolder | None,
        callback: BlockEndCallback | None,
        say: Callable[[str], None],
    ) -> None:
        self.pipeline, self.plan, self.folder, self.callback, self.say = pipeline, plan, folder, callback, say
        self.watch = Stopwatch()
        self.chunks: list[StreamedChunk] = []
        self.seconds = dict.fromkeys(("text", "encode", *STAGES), 0.0)
        self._key = jax.random.key(plan.request.seed)
        self._compiling: list[tuple[float, float]] = []
        self._delivered = 0.0  # when the chunk before was
        self.device_bytes: int | None = None
        self._picture: Array | None = None  # its latents
        self._state: SanaWMState | None = None
        self._decoder: PyTree = None
        self._refiner: RefinerRun | None = None
        self._kept = dict.fromkeys(_KINDS, 0)

    def make(
        self,
        output_path: Any,
        output_type: OutputType,
        resume: bool,
        enlarge: int,
        metadata: Mapping[str, Any] | None,
    ) -> SanaWMStreamingPipelineOutput:
        """Makes the video; arguments as in ``SanaWMStreamingPipeline``."""
        pipeline, plan, begin = self.pipeline, self.plan, time.perf_counter()
        keep = self._look_back(output_path) if resume else 0
        conditions, _ = pipeline._conditions(plan.request, guided=False)
        pipeline._leave(TEXT)
        self._begin_refining()
        self._spent("text", begin)
        sampling = time.perf_counter()
        if not self._kept["latents"]:
            self._picture = pipeline._first_frame(plan.view)
            self._spent("encode", sampling)
        options = {"keep_frames": keep, "enlarge": enlarge, "metadata": metadata, "say": self.say}
        output = GrowingOutput(output_path, plan.fps, **options)
        latents_only = output_path is None and output_type == "latent"
        try:
            done = self._all_chunks(conditions, output, latents_only)
        except BaseException:
            output.close(finish=False)
            raise
        finished = done == plan.chunks
        output.close(finish=finished)
        if self.folder is not None and finished:
            self.folder.remove()
        pipeline._leave(TRANSFORMER)
        pipeline._leave(AUTOENCODER)
        parts = plan.drawn_with(done - 1).stop
        count = plan.frames_of(parts)
        self._say_end(count, finished)
        shown = slice(plan.hidden_frames, plan.hidden_frames + count)
        if latents_only:
            shown = slice(pixel_frames(plan.drawn[parts], plan.temporal_factor) if parts else 0)
        return SanaWMStreamingPipelineOutput(
            output.gathered(output_type),
            output.path,
            count,
            finished,
            np.asarray(plan.poses[shown], np.float32),
            plan.fps,
            tuple(self.chunks),
            sum(end - start for start, end in self._compiling),
            time.perf_counter() - sampling,
            self.device_bytes,
            dict(self.seconds),
            plan.size.sampled,
        )

    # -- going on ------------------------------------------------------------------------------------------------

    def _look_back(self, output_path: Any) -> int:
        """Counts the blocks that are there; returns the frames of the file that are kept."""
        plan = self.plan
        for kind in _KINDS:
            self._kept[kind] = self.folder.blocks(kind)
        parts = self._kept["latents" if plan.refining is None else "refined"]
        keep = frames_to_keep(output_path, map(plan.frames_of, range(parts + 1)))
        refined = "" if plan.refining is None else f" and {self._kept['refined']} blocks of the refiner"
        self.say(
            f"resuming behind chunk {self._kept['latents']} of {plan.chunks}{refined}: {keep} frames of the file are "
            "kept; what is there is read and decoded again for the states"
        )
        return keep

    def _block_there(self, kind: str, block: int, first: int, end: int) -> Float[np.ndarray, "1 T h w C"] | None:
        """A block that an earlier run has left; None where it is to be made."""
        if block >= self._kept[kind]:
            return None
        return self.folder.load(kind, block, (1, end - first, *self.pipeline.latent_shape(self.plan.size)))

    # -- the three stages ------------------------------------------------------------------------------------------

    def _begin_refining(self) -> None:
        part, plan = self.plan.refining, self.plan
        if part is None:
            return
        refiner = part.refiner
        embeds = part.prompt_embeds
        embeds = refiner.encode_prompt(part.prompt) if embeds is None else as_numbers("prompt_embeds", embeds)
        blocks = part.sampler.blocks(plan.starts[-1])
        kept = {
            block: found
            for block, place in enumerate(blocks)
            if (found := self._block_there("refined", block, *place)) is not None
        }
        self._refiner = RefinerRun(refiner, part.sampler, plan.starts[-1], part.noise, embeds[:1], plan.fps, kept)

    def _dispatch(self, chunk: int, conditions: Encoded, output: GrowingOutput, latents_only: bool) -> _Dispatched:
        """Gives the device the work of a chunk, and waits for nothing."""
        begin, plan = time.perf_counter(), self.plan
        if chunk == 0:
            self._state = plan.state()
        latents, kept = self._first_stage(chunk, conditions)
        refined, ready = (), ((plan.drawn_with(chunk).start, latents),)
        if self._refiner is not None:
            refined, ready = self._second_stage(latents)
        parts = []
        for part, wide in ready:
            if latents_only:
                parts.append((part, wide))
                continue
            frames = self._decode(wide)
            if output.path is None or plan.frames_of(part + 1) > output.frame_count:
                parts.append((part, frames))
        return _Dispatched(chunk, latents, kept, refined, tuple(parts), self._state_bytes(), begin)

    def _first_stage(self, chunk: int, conditions: Encoded) -> tuple[Float[Array, "1 T h w C"], bool]:
        """A chunk's clean latents, and whether they were there; the state goes on to the next one."""
        pipeline, plan = self.pipeline, self.plan
        first, end = plan.starts[chunk : chunk + 2]
        camera = plan.view.camera
        takes = pipeline.transformer.config.use_chunk_plucker_post_attn
        inputs = (
            conditions,
            jnp.asarray(camera.conditions[None, first:end]),
            jnp.asarray(camera.chunk_plucker[None, first:end]) if takes else None,
            jnp.int32(first),
        )
        common = (pipeline.params, pipeline._runtime_lora, self._state)
        there = self._block_there("latents", chunk, first, end)
        if there is not None:
            latents = jnp.asarray(there)
        else:
            given = self._picture if chunk == 0 else None
            schedule = jax.tree.map(jnp.asarray, plan.schedule)
            arguments = (*common, self._noise(chunk), given, schedule, *inputs)
            latents = self._compiled(pipeline.generate_program(arguments))(*arguments)
            self.device_bytes = self.watch.device_bytes
        if chunk + 1 < plan.chunks and self._kept["latents"] < plan.chunks:
            arguments = (*common, latents, *inputs)
            self._state = self._compiled(pipeline.read_program(arguments))(*arguments)
        return latents, there is not None

    def _noise(self, chunk: int) -> Float[Array, "1 T h w C"]:
        """Unit normal noise that a chunk starts from: a function of (seed, chunk), or what was given."""
        first, end = self.plan.starts[chunk : chunk + 2]
        if self.plan.given is not None:
            return jnp.asarray(self.plan.given[:, first:end])
        key = jax.random.fold_in(jax.random.fold_in(self._key, _START), chunk)
        return jax.random.normal(key, (1, end - first, *self.pipeline.latent_shape(self.plan.size)), jnp.float32)

    def _second_stage(
        self, latents: Float[Array, "1 T h w C"]
    ) -> tuple[tuple[RefinedBlock, ...], tuple[tuple[int, Array], ...]]:
        """Blocks that are refined with this chunk, in float32; and with their numbers what is to be drawn of them."""
        run, refiner = self._refiner, self.plan.refining.refiner
        found, ready = [], []
        compiled = refiner.compile_seconds
        for block in run.push(latents):
            wide = jnp.asarray(block.latents).astype(jnp.float32)
            found.append(block._replace(latents=wide))
            whole = wide if block.index else jnp.concatenate([run.sink.astype(jnp.float32), wide], axis=1)
            ready.append((block.index, whole))
        self._note_compiling(refiner.compile_seconds - compiled)
        return tuple(found), tuple(ready)

    def _decode(self, latents: Float[Array, "1 T h w C"]) -> Float[Array, "1 F H W P"]:
        autoencoder, begin = self.pipeline.autoencoder, time.perf_counter()
        programs = len(getattr(autoencoder, "programs", ()))
        frames, self._decoder = autoencoder.decode_frames(latents, self._decoder)
        if len(getattr(autoencoder, "programs", ())) > programs:
            self._compiling.append((begin, time.perf_counter()))
        return frames

    def _state_bytes(self) -> dict[str, int]:
        refiner = None if self._refiner is None else self._refiner.state
        states = {"denoise": self._state, "refine": refiner, "decode": self._decoder}
        return {stage: sum(leaf.nbytes for leaf in jax.tree.leaves(state)) for stage, state in states.items()}

    # -- chunks --------------------------------------------------------------------------------------------------

    def _all_chunks(self, conditions: Encoded, output: GrowingOutput, latents_only: bool) -> int:
        """Makes the chunks; returns how many there are then."""
        self._delivered = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(1, "writing") as worker:
            pending = None
            for chunk in range(self.plan.chunks):
                dispatched = self._dispatch(chunk, conditions, output, latents_only)
                if pending is not None and not self._settle(chunk - 1, pending.result()):
                    return chunk
                pending = worker.submit(self._deliver, dispatched, output, latents_only)
            self._settle(self.plan.chunks - 1, pending.result())
        return self.plan.chunks

    def _deliver(self, made: _Dispatched, output: GrowingOutput, latents_only: bool) -> _Delivered:
        """In the other thread: fetches a chunk's results as they come, keeps them and writes the frames.

        It asks nothing of the device, which is at work on the next chunk by then.
        """
        plan, chunk = self.plan, made.chunk
        begin, times = max(self._delivered, made.begin), [max(self._delivered, made.begin)]
        latents = np.asarray(made.latents, np.float32)
        if not made.latents_kept:
            self._check(f"chunk {chunk + 1} of {plan.chunks}", latents)
            self._keep("latents", chunk, latents)
        times.append(time.perf_counter())
        refined = [np.asarray(block.latents, np.float32) for block in made.refined]
        for block, array in zip(made.refined, refined, strict=True):
            if not block.was_kept:
                self._check(f"refining block {block.index + 1}", array)
                self._keep("refined", block.index, array)
        times.append(time.perf_counter())
        parts = [np.asarray(array, np.float32)[0] for _, array in made.parts]
        times.append(time.perf_counter())
        for (part, _), array in zip(made.parts, parts, strict=True):
            if not latents_only:
                self._check("decoding", array[None])
                array = shown_in_unit_range(array[plan.hidden_frames if part == 0 else 0 :])
            output.append(array)
        times.append(time.perf_counter())
        shown = {"latents": np.moveaxis(latents, -1, 1), "refined": None}
        if refined:
            shown["refined"] = np.moveaxis(np.concatenate(refined, axis=1), -1, 1)
        measured = self._measured(made, begin, times) if made.is_new else None
        self._delivered = times[-1]
        return _Delivered(shown, measured)

    def _measured(self, made: _Dispatched, begin: float, times: list[float]) -> StreamedChunk:
        plan, spans = self.plan, itertools.pairwise(times)
        parts = plan.drawn_with(made.chunk)
        return StreamedChunk(
            plan.starts[made.chunk : made.chunk + 2],
            plan.frames_of(parts.stop) - plan.frames_of(parts.start),
            self._without_compiling(begin, times[-1]),
            {stage: self._without_compiling(*span) for stage, span in zip(STAGES, spans, strict=True)},
            made.state_bytes,
        )

    def _settle(self, chunk: int, delivered: _Delivered) -> bool:
        """Says what a chunk was and shows it; returns whether the video goes on."""
        if delivered.measured is None:
            return True
        measured, plan = delivered.measured, self.plan
        self.chunks.append(measured)
        for stage, seconds in measured.stages.items():
            self.seconds[stage] += seconds
        first, end = measured.latent_frames
        done, rate = plan.frames_of(plan.drawn_with(chunk).stop), measured.frames / max(measured.seconds, 1e-9)
        self.say(
            f"chunk {chunk + 1} of {plan.chunks}: latent frames {first} to {end - 1}, {measured.frames} frames in "
            f"{measured.seconds:.2f} s, {rate:.1f} per second; {done} of {plan.frames} frames done, state "
            f"{readable_bytes(sum(measured.state_bytes.values()))}"
        )
        if self.callback is None:
            return True
        return goes_on(self.callback(self.pipeline, chunk, delivered.shown)) or chunk + 1 == plan.chunks

    def _keep(self, kind: str, block: int, latents: Float[np.ndarray, "1 T h w C"]) -> None:
        if self.folder is not None:
            self.folder.save(kind, block, latents)

    def _check(self, stage: str, values: np.ndarray) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            raise not_finite(stage, finite.reshape(len(finite), -1).all(axis=1), self.pipeline.made)

    # -- time ----------------------------------------------------------------------------------------------------

    def _compiled(self, program: Any) -> Callable:
        self._note_compiling(program.seconds)
        return self.watch.compiled(program)

    def _note_compiling(self, seconds: float) -> None:
        """So many seconds up to now went into compiling."""
        if seconds > 0:
            now = time.perf_counter()
            self._compiling.append((now - seconds, now))

    def _without_compiling(self, begin: float, end: float) -> float:
        shared = (min(end, last) - max(begin, first) for first, last in list(self._compiling))
        return max(0.0, end - begin - sum(max(0.0, seconds) for seconds in shared))

    def _spent(self, stage: str, begin: float) -> None:
        self.seconds[stage] += time.perf_counter() - begin

    def _say_end(self, count: int, finished: bool) -> None:
        how = "made" if finished else "ended by the callback, to be resumed, after"
        seconds = sum(chunk.seconds for chunk in self.chunks)
        line = f"{how} {counted(count, 'frame')}; {counted(len(self.chunks), 'chunk')} in {seconds:.2f} s"
        if later := self.chunks[2:] or self.chunks[1:]:
            middle = statistics.median(chunk.seconds for chunk in later)
            count = later[0].frames
            line += (
                f", a later chunk of {count} frames in {middle:.2f} s (median), {count / max(middle, 1e-9):.1f} per "
            )
            line += "second"
        self.say(line)
