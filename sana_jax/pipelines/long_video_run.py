"""One long video while it is made: block after block to the file, and what it takes to go on."""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, PRNGKeyArray, PyTree
from sana_jax.autoencoders.base import pixel_frames
from sana_jax.diffusion.sampling import plain_truth
from sana_jax.errors import UserError, counted
from sana_jax.models.sana_video import SanaVideoState, init_state
from sana_jax.pipelines.base import OutputType, Size, Stopwatch
from sana_jax.pipelines.checks import check_finite
from sana_jax.pipelines.growing_output import GrowingOutput, frames_to_keep, shown_in_unit_range
from sana_jax.pipelines.long_video_state import ResumeFolder
from sana_jax.pipelines.prompt_schedule import BlockPrompts, PromptSwitch, check_next_prompt
from sana_jax.pipelines.residency import AUTOENCODER, TEXT, TRANSFORMER
from sana_jax.pipelines.resolution import resize_and_crop
from sana_jax.pipelines.sampling_function import Encoded
from sana_jax.pipelines.video_base import VideoRequest

if TYPE_CHECKING:
    from sana_jax.pipelines.long_video import LongSanaVideoPipeline

BlockEndCallback = Callable[["LongSanaVideoPipeline", int, dict[str, Any]], Any]
# apart from the noise of other pipelines, and of the steps from one another
_START, _STEPS = 2**31 + 1, 2**31 + 2


@dataclasses.dataclass(frozen=True)
class LongSanaVideoPipelineOutput:
    """What a call has made.

    Attributes:
        frames: None with an ``output_path``; else a list of one video, a list of PIL images; an array
            (1, F, H, W, 1 or 3) in [0, 1]; or latents (1, C, T, h, w), as asked for.
        path: the file or folder that was written.
        frame_count: frames of the video so far.
        finished: whether it is whole; False where a callback ended it.
        fps: frames per second at which they are to be shown.
        block_seconds: of every block that was made now, from noise to the file, without compiling.
        compile_seconds: of the transformer's programs; 0 where they were compiled before.
        sampling_seconds: of everything after the text.
        device_bytes: what the program of the later blocks holds on the device; None where that is not known.
        seconds: of each stage: text, denoise (without compiling), decode, write.
        sampled_size: height and width in pixels that were sampled, before cropping to what was asked for.
        prompts: (second, prompt) of all that acted so far, those of the callback among them: given as ``prompt`` to a
            call without a callback, they make the same video. None where embeddings were given.
    """

    frames: Any
    path: pathlib.Path | None
    frame_count: int
    finished: bool
    fps: float
    block_seconds: tuple[float, ...]
    compile_seconds: float
    sampling_seconds: float
    device_bytes: int | None
    seconds: Mapping[str, float]
    sampled_size: tuple[int, int]
    prompts: tuple[PromptSwitch, ...] | None = None


class Plan(NamedTuple):
    """One call, once everything about it was checked.

    Attributes:
        starts: first latent frame of every block, and the end.
        prompts: those that are given; None where embeddings are.
        size: pixels that are asked for, and that are sampled.
        fps: frames per second.
        num_cached_blocks: earlier blocks that a block sees; None for all.
        temporal_factor: frames that a latent frame but the first stands for.
    """

    starts: tuple[int, ...]
    prompts: BlockPrompts | None
    size: Size
    fps: float
    num_cached_blocks: int | None
    temporal_factor: int

    @property
    def blocks(self) -> int:
        """Their number."""
        return len(self.starts) - 1

    @property
    def latent_frames(self) -> int:
        """Of the whole video."""
        return self.starts[-1]

    @property
    def frames(self) -> int:
        """Of the whole video."""
        return self.frames_of(self.blocks)

    def frames_of(self, blocks: int) -> int:
        """Frames of so many blocks from the first on."""
        return pixel_frames(self.starts[blocks], self.temporal_factor) if blocks else 0

    def seconds_of(self, block: int) -> float:
        """When a block begins."""
        return self.frames_of(block) / self.fps


class LongVideoRun:
    """One video while it is made."""

    def __init__(
        self,
        pipeline: LongSanaVideoPipeline,
        plan: Plan,
        request: VideoRequest,
        seed: int,
        latents: Any,
        folder: ResumeFolder | None,
        callback: BlockEndCallback | None,
        say: Callable[[str], None],
    ) -> None:
        self.pipeline, self.plan, self.request, self.folder = pipeline, plan, request, folder
        self.callback, self.say = callback, say
        self.prompts, self._noted = plan.prompts, None
        self._encoded: dict[str | None, Encoded] = {}
        self.watch = Stopwatch()
        self.seconds = {"text": 0.0, "denoise": 0.0, "decode": 0.0, "write": 0.0}
        self.block_seconds: list[float] = []
        self.device_bytes: int | None = None
        self._key = jax.random.key(seed)
        self._given = None if latents is None else np.moveaxis(np.asarray(latents, np.float32), 1, -1)

    def make(
        self,
        output_path: Any,
        output_type: OutputType,
        resume: bool,
        enlarge: int,
        metadata: Mapping[str, Any] | None,
    ) -> LongSanaVideoPipelineOutput:
        """Makes the video; arguments as in ``LongSanaVideoPipeline``."""
        pipeline, plan = self.pipeline, self.plan
        begin = time.perf_counter()
        dtype = pipeline.transformer.dtype
        config, grid = pipeline.transformer.config, pipeline.token_grid(plan.size)
        fresh = jax.eval_shape(lambda: init_state(config, 1, grid, plan.num_cached_blocks, dtype))
        done, state = 0, None
        if resume:
            done, state = self.folder.load(fresh)
            self._take_up_prompts(done)
        else:
            state = init_state(config, 1, grid, plan.num_cached_blocks, dtype)
        self._spent("text", begin)
        self._encode(range(done, plan.blocks))
        sampling = time.perf_counter()
        keep = 0
        if output_path is not None:
            keep = frames_to_keep(output_path, map(plan.frames_of, range(done + 1))) if done else 0
            if resume:
                self._say_resumed(done, keep, self._decoded_from(done, keep))
        options = {"keep_frames": keep, "enlarge": enlarge, "metadata": metadata, "say": self.say}
        output = GrowingOutput(output_path, plan.fps, **options)
        try:
            blocks = self._all_blocks(done, state, output, output_type)
        except BaseException:
            output.close(finish=False)
            raise
        output.close(finish=blocks == plan.blocks)
        if self.folder is not None and blocks == plan.blocks:
            self.folder.remove()
        pipeline._leave(TRANSFORMER)
        pipeline._leave(AUTOENCODER)
        self._say_end(blocks)
        return LongSanaVideoPipelineOutput(
            output.gathered(output_type),
            output.path,
            plan.frames_of(blocks),
            blocks == plan.blocks,
            plan.fps,
            tuple(self.block_seconds),
            self.watch.compile_seconds,
            time.perf_counter() - sampling,
            self.device_bytes,
            dict(self.seconds),
            plan.size.sampled,
            self._acted(blocks),
        )

    # -- blocks --------------------------------------------------------------------------------------------------

    def _all_blocks(
        self,
        done: int,
        state: SanaVideoState,
        output: GrowingOutput,
        output_type: OutputType,
    ) -> int:
        """Makes the blocks from ``done`` on; returns how many there are then."""
        plan, pipeline = self.plan, self.pipeline
        decoded = self._decoded_before(done, output) if done else None
        params, lora = pipeline.params, pipeline._runtime_lora
        for block in range(done, plan.blocks):
            begin, compiled = time.perf_counter(), self.watch.compile_seconds
            inputs = (params, lora, state, self._start(block), self._steps_key(block), self._encoded[self._text(block)])
            arguments = (*inputs, jnp.int32(plan.starts[block]))
            program = pipeline.block_program(self.watch, arguments)
            self.device_bytes = self.watch.device_bytes
            del inputs, state
            latents, state = program(*arguments)
            del arguments
            check_finite(f"block {block + 1} of {plan.blocks}", latents, pipeline.made)
            compiling = self.watch.compile_seconds - compiled
            self._spent("denoise", begin + compiling)
            if output.path is None and output_type == "latent":
                output.append(np.asarray(latents)[0])
            else:
                video, decoded = self._decode(latents, decoded)
                self._write(video, output)
            if self.folder is not None:
                saving = time.perf_counter()
                self._note_prompts()
                self.folder.save(block, latents, state)
                self._spent("write", saving)
            self.block_seconds.append(time.perf_counter() - begin - compiling)
            self._say_block(block)
            if self.callback is not None:
                shown = np.moveaxis(np.asarray(latents), -1, 1)
                if not self._goes_on(self.callback(pipeline, block, {"latents": shown}), block):
                    return block + 1
        return plan.blocks

    def _start(self, block: int) -> Float[Array, "1 T h w C"]:
        """Unit normal noise that a block starts from: a function of (seed, block), or what was given."""
        plan, autoencoder = self.plan, self.pipeline.autoencoder
        first, end = plan.starts[block : block + 2]
        if self._given is not None:
            return jnp.asarray(self._given[:, first:end])
        rows, columns = (length // autoencoder.spatial_factor for length in plan.size.sampled)
        shape = (1, end - first, rows, columns, autoencoder.latent_channels)
        return jax.random.normal(_fold(self._key, _START, block), shape, jnp.float32)

    def _steps_key(self, block: int) -> PRNGKeyArray:
        """The key of the noise between a block's steps."""
        return _fold(self._key, _STEPS, block)

    def _decode(self, latents: Float[Array, "1 T h w C"], state: PyTree | None) -> tuple[np.ndarray, PyTree]:
        """A block's frames (F, H, W, C) in [0, 1] as asked for, and the autoencoder's state."""
        begin = time.perf_counter()
        decoded, state = self.pipeline.autoencoder.decode_frames(latents, state)
        check_finite("decoding", decoded, self.pipeline.made)
        video = resize_and_crop(np.asarray(decoded, np.float32)[0], *self.plan.size.requested)
        self._spent("decode", begin)
        return shown_in_unit_range(video), state

    def _write(self, video: np.ndarray, output: GrowingOutput) -> None:
        begin = time.perf_counter()
        output.append(video)
        self._spent("write", begin)

    def _spent(self, stage: str, begin: float) -> None:
        self.seconds[stage] += time.perf_counter() - begin

    # -- prompts -------------------------------------------------------------------------------------------------

    def _text(self, block: int) -> str | None:
        return None if self.prompts is None else self.prompts.acting(block)

    def _encode(self, blocks: Iterable[int]) -> None:
        """Encodes the prompts of these blocks, or takes the embeddings that were given.

        Each text is encoded by itself: what a block sees of its prompt must not depend on the others.
        """
        begin, pipeline = time.perf_counter(), self.pipeline
        for text in dict.fromkeys(map(self._text, blocks)):
            if text not in self._encoded:
                request = self.request if text is None else dataclasses.replace(self.request, prompt=[text])
                self._encoded[text], _ = pipeline._conditions(request, guided=False)
        pipeline._leave(TEXT)
        self._spent("text", begin)

    def _goes_on(self, answer: Any, block: int) -> bool:
        """Whether the video goes on after a block, by the callback's answer; a text is the next block's prompt."""
        answer = plain_truth(answer)
        if answer is None or isinstance(answer, bool):
            return answer is None or answer or block + 1 == self.plan.blocks
        if not isinstance(answer, str):
            raise UserError(
                f"callback_on_block_end returned a value of type {type(answer).__name__}, which would not be used; "
                "allowed are None, False to stop, and a text, the prompt from the next block on"
            )
        if self.prompts is None:
            raise UserError(
                "callback_on_block_end returned a prompt, and the video has prompt_embeds: give a prompt in their place"
            )
        check_next_prompt(answer)
        if block + 1 == self.plan.blocks:
            self.say(f"{answer!r}, which the callback returned after the last block, is not used")
        elif answer != self._text(block + 1):
            self.prompts = self.prompts.changed(block + 1, answer)
            self._encode([block + 1])
            self._note_prompts()
            self.say(f"from {self._named(block + 1)}, as the callback says: {answer!r}")
        return True

    def _note_prompts(self) -> None:
        if self.folder is not None and self.prompts != self._noted:
            self.folder.save_prompts(self.prompts)
            self._noted = self.prompts

    def _take_up_prompts(self, done: int) -> None:
        """Adds the prompts of an earlier call's callback; those of blocks that are made must be as they were.

        Raises:
            UserError: they are not.
        """
        if self.plan.prompts is None:
            return
        before = self._noted = self.folder.load_prompts()
        self.prompts = now = dataclasses.replace(self.plan.prompts, given=before.given)
        changed = [block for block in range(self.plan.blocks) if now.acting(block) != before.acting(block)]
        if changed and changed[0] < done:
            made, given = before.acting(changed[0]), now.acting(changed[0])
            raise UserError(
                f"what begins at {self._named(changed[0])} was made with the prompt {made!r}, and {given!r} is given "
                f"for it; prompts may change from {self._named(done)} on: give those before as they were, or name "
                "another output"
            )
        if changed:
            told = (
                f"{text!r} from {self._named(first)} in place of {before.acting(first)!r}"
                for first, text in now.runs(changed)
            )
            self.say(f"prompts have changed: {'; '.join(told)}")
        elif now.given:
            told = (f"{text!r} from {self._named(first)}" for first, text in now.given)
            self.say(f"prompts of the earlier call's callback: {'; '.join(told)}")

    def _acted(self, blocks: int) -> tuple[PromptSwitch, ...] | None:
        if self.prompts is None:
            return None
        runs = self.prompts.runs(range(blocks))
        return tuple(PromptSwitch(self.plan.seconds_of(block), text) for block, text in runs)

    def _named(self, block: int) -> str:
        return f"{self.plan.seconds_of(block):g} s (block {block + 1})"

    # -- going on ------------------------------------------------------------------------------------------------

    def _decoded_from(self, done: int, keep: int) -> int:
        """The block to decode from, so that frames after the first ``keep`` are, to the bit, as if nothing had ended.

        The video begins anew in that block, for the decoder: its program is another one than it was, and zeros stand
        in place of what was before. So it lies whole before all that the first frames to be written depend on, and the
        blocks between run the programs that they ran.
        """
        history, plan = self.pipeline.autoencoder.decoder_history, self.plan
        if history is None:
            return 0
        written = next((block for block in range(done) if plan.frames_of(block + 1) > keep), done)
        needed = plan.starts[written] - history
        return max((block for block in range(written) if plan.starts[block + 1] <= needed), default=0)

    def _decoded_before(self, done: int, output: GrowingOutput) -> PyTree:
        """The autoencoder's state after the blocks that are there; those that the file lacks are written."""
        state = None
        for block in range(self._decoded_from(done, output.frame_count), done):
            video, state = self._decode(jnp.asarray(self.folder.latents(block)), state)
            if self.plan.frames_of(block + 1) > output.frame_count:
                self._write(video, output)
        return state

    # -- what is said --------------------------------------------------------------------------------------------

    def _say_resumed(self, done: int, keep: int, first: int) -> None:
        which = f"block {done} is" if first + 1 == done else f"blocks {first + 1} to {done} are"
        self.say(
            f"resuming after block {done} of {self.plan.blocks}: {keep} frames of the file are kept, and {which} "
            "decoded again for the autoencoder's state"
        )

    def _say_block(self, block: int) -> None:
        first, end = self.plan.starts[block : block + 2]
        count, seconds = self.plan.frames_of(block + 1) - self.plan.frames_of(block), self.block_seconds[-1]
        self.say(
            f"block {block + 1} of {self.plan.blocks}: latent frames {first} to {end - 1}, {count} frames in "
            f"{seconds:.2f} s, {count / seconds:.1f} per second"
        )

    def _say_end(self, blocks: int) -> None:
        made, plan = self.block_seconds, self.plan
        how = "made"
        if blocks < plan.blocks:
            how = f"ended by the callback{'' if self.folder is None else ', to be resumed,'} after"
        line = f"{how} {counted(plan.frames_of(blocks), 'frame')}; {counted(len(made), 'block')} in {sum(made):.2f} s"
        if later := made[2:] or made[1:]:
            middle = statistics.median(later)
            count = plan.frames - plan.frames_of(plan.blocks - 1)
            line += f", a later block of {count} frames in {middle:.2f} s (median), {count / middle:.1f} per second"
        self.say(line)


def _fold(key: PRNGKeyArray, stream: int, block: int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.fold_in(key, stream), block)
