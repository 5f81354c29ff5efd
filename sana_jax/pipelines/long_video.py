"""LongSANA: videos of minutes, block after block, in constant memory (SANA-Video, arXiv 2509.24695, §4)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int
from sana_jax.autoencoders.base import pixel_frames
from sana_jax.compilation import readable_bytes
from sana_jax.diffusion.samplers import LongSanaSampler
from sana_jax.diffusion.samplers.longsana import causal_block_starts, generate_block, read_block
from sana_jax.errors import UserError, counted
from sana_jax.models.sana_video import SanaVideoState, kv_cache_bytes, state_bytes
from sana_jax.nn.rope import check_positions
from sana_jax.pipelines.base import OutputType, Size, Stopwatch
from sana_jax.pipelines.checks import as_numbers, finite_scale
from sana_jax.pipelines.decoding import check_decodes_blocks, stream_blocks
from sana_jax.pipelines.growing_output import check_frames_in_memory, check_output_arguments
from sana_jax.pipelines.long_video_run import BlockEndCallback, LongSanaVideoPipelineOutput, LongVideoRun, Plan
from sana_jax.pipelines.long_video_state import ResumeFolder
from sana_jax.pipelines.prompt_schedule import BlockPrompts, PromptSwitch, parse_prompts, prompts_of_blocks
from sana_jax.pipelines.residency import AUTOENCODER, TEXT, TRANSFORMER, Residency
from sana_jax.pipelines.resolution import Binning
from sana_jax.pipelines.resumed_folder import digest
from sana_jax.pipelines.sampling_function import transformer_variables
from sana_jax.pipelines.video_base import VideoPipeline, VideoRequest, frames_of_seconds
from sana_jax.pipelines.weights_settings import weights_settings
from sana_jax.videos import check_fps, check_video_path

ATTENTION_EPSILON = 1e-8  # of the training code, which LongSANA's weights are published for
TRAINED_LATENT_FRAMES = 261  # of the longest videos that training saw


class LongSanaVideoPipeline(VideoPipeline):
    """Makes videos of any length up to the model's rotary positions; arguments as in ``SamplingPipeline``.

    A block of latent frames is sampled in a few steps, read once more at timestep 0 for the state that the next block
    sees, decoded, written, and forgotten. Memory depends on the size of a frame alone, not on their number.
    """

    class_name = "LongSanaVideoPipeline"
    sampler: LongSanaSampler

    @classmethod
    def _from_model(cls, model: Any, residency: Residency, **networks: Any) -> Any:
        _check_residency(residency)  # before anything is chosen or quantised by a plan of memory
        stream_blocks(model.autoencoder, model.path)
        network = model.transformer.clone(attention_epsilon=ATTENTION_EPSILON)
        return super()._from_model(dataclasses.replace(model, transformer=network), residency, **networks)

    def check_components(self) -> None:
        """Raises ``UserError`` for another sampler, an autoencoder without a state, or networks one at a time."""
        if not isinstance(self.sampler, LongSanaSampler):
            raise UserError(
                f"{self.class_name} with the sampler {type(self.sampler).__name__}; allowed is LongSanaSampler, for "
                "which LongSANA was distilled: use its scheduler_config.json"
            )
        check_decodes_blocks(self.autoencoder, self.class_name)
        _check_residency(self.residency)

    def __call__(
        self,
        prompt: str | Sequence[str] | Sequence[tuple[float, str]] | None = None,
        seconds: float | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        output_path: str | os.PathLike[str] | None = None,
        resume: bool = False,
        num_cached_blocks: int | None = None,
        block_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        fps: float | None = None,
        latents: Float[Array, "1 C T H W"] | None = None,
        prompt_embeds: Float[Array, "1 L C"] | None = None,
        prompt_attention_mask: Int[Array, "1 L"] | None = None,
        motion_score: int | None = None,
        binning: Binning | None = None,
        max_sequence_length: int | None = None,
        complex_human_instruction: Sequence[str] | None = None,
        output_type: OutputType | None = None,
        enlarge: int = 1,
        metadata: Mapping[str, Any] | None = None,
        callback_on_block_end: BlockEndCallback | None = None,
        say: Callable[[str], None] = print,
    ) -> LongSanaVideoPipelineOutput:
        """Makes one video. What is None comes from the model.

        Block b of ``block_frames`` latent frames is a function of (seed, b) and of the blocks before it, whatever
        comes after. The first block takes the remainder: 21 latent frames are blocks of 11 and 10. Videos whose
        lengths differ by whole blocks begin alike.

        Args:
            prompt: a text; or several, each a pair (seconds, text) or a text such as "10s: it wakes up". A prompt acts
                from the block whose beginning is nearest to its time; the state is carried on, so that what was shown
                stays until the new text changes it.
            seconds: length, rounded to a number of frames that the model makes, which is printed.
            frames: length, 1 + k times the autoencoder's temporal factor, in place of ``seconds``.
            height: pixels of the result.
            width: pixels of the result.
            seed: of all noise, with the block and the step; 0 to 2³² - 1.
            output_path: an mp4, or a folder for pictures, that grows with every block; no frames are kept in memory.
                Until the video is whole, ``<output_path>.resume`` beside it has what it takes to go on.
            resume: goes on with the video at ``output_path`` after its last whole block; the frames are those that it
                would have had. All else that decides what they are must be given as before, but for prompts of blocks
                that are not made yet. Prompts that a callback gave are kept.
            num_cached_blocks: how many earlier blocks a block sees; 0 for all.
            block_frames: refuses a model that was trained with blocks of another size.
            num_inference_steps: refuses a model that was distilled to another number of steps.
            guidance_scale: 1 is allowed: the model was distilled with guidance.
            fps: frames per second of the file.
            latents: the noise that blocks start from, unit normal; the noise between steps is the seed's.
            prompt_embeds: an encoded prompt in place of ``prompt``, with ``prompt_attention_mask``.
            prompt_attention_mask: 1 where a token counts.
            motion_score: writes `` motion score: N.`` behind every prompt; LongSANA was trained with 10.
            binning: as in ``SanaVideoPipeline``.
            max_sequence_length: prompt tokens that count, where the text encoder has that setting.
            complex_human_instruction: as in ``SanaVideoPipeline``.
            output_type: ``"pil"`` (default), ``"np"`` or ``"latent"``, without ``output_path``: for short videos.
            enlarge: every pixel of the file this many times.
            metadata: what is noted in the file.
            callback_on_block_end: called as (pipeline, block, {"latents": (1, C, T, h, w)}) after every block, which is
                written then. If it returns False, the video ends there, and can be resumed. If it returns a text, that
                is the prompt from the next block on, until the next one of ``prompt`` begins.
            say: prints a line.

        Raises:
            UserError: a value that is not allowed, arguments that exclude one another or would not be used, more frames
                than the model has positions for, or values that stop being finite.
            FileNotFoundError: there is nothing to resume.
        """
        check_output_arguments(output_path, output_type, resume, enlarge, seed)
        self._check_distilled(guidance_scale, num_inference_steps, block_frames)
        texts = _texts(prompt, prompt_embeds)
        if latents is not None:
            latents = np.asarray(as_numbers("latents", latents), np.float32)
        plan = self._plan(texts, seconds, frames, (height, width), binning, fps, num_cached_blocks, latents, say)
        if output_path is None:
            check_frames_in_memory(plan.frames, plan.size.requested, self.autoencoder.image_channels)
        self._say_plan(plan, say)
        request = VideoRequest(
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            motion_score=motion_score,
            max_sequence_length=max_sequence_length,
            complex_human_instruction=complex_human_instruction,
        )
        folder = None
        if output_path is not None:
            check_video_path(output_path, progressive=True, goes_on=resume)
            settings = self._settings(plan, seed, request, latents, enlarge)
            folder = ResumeFolder(output_path, settings, say)
            if not resume:
                folder.begin()
        return LongVideoRun(self, plan, request, seed, latents, folder, callback_on_block_end, say).make(
            output_path, output_type or "pil", resume, enlarge, metadata
        )

    # -- what a call asks for ------------------------------------------------------------------------------------

    def _check_distilled(self, scale: float | None, steps: int | None, block_frames: int | None) -> None:
        if scale is not None and (given := finite_scale(scale)) != 1:
            raise UserError(
                f"guidance_scale {given:g}: this model was distilled with guidance and runs without; allowed is 1: "
                "leave it out"
            )
        self.sampler.schedule(steps)  # refuses another number of steps
        if block_frames is not None and block_frames != self.sampler.block_frames:
            raise UserError(
                f"block_frames {block_frames} does not fit this model, which was trained with blocks of "
                f"{self.sampler.block_frames} latent frames; leave it out, or choose a model that was trained so"
            )

    def _plan(
        self,
        texts: tuple[PromptSwitch, ...] | None,
        seconds: float | None,
        frames: int | None,
        shape: tuple[int | None, int | None],
        binning: Binning | None,
        fps: float | None,
        num_cached_blocks: int | None,
        latents: Any,
        say: Callable[[str], None],
    ) -> Plan:
        """Everything about the call that can be refused before any work."""
        fps, factor = self.fps if fps is None else check_fps(fps), self.autoencoder.temporal_factor
        if seconds is not None:
            if frames is not None or latents is not None:
                raise UserError("seconds beside frames or latents: only one is allowed; leave the others out")
            frames = frames_of_seconds(seconds, fps, factor, say)
        total = self._frames(VideoRequest(frames=frames, latents=latents))
        size = self._video_size(*shape, binning, latents, say)
        if latents is not None and np.shape(latents)[0] != 1:
            raise UserError(f"latents of {np.shape(latents)[0]} videos; allowed is one: call once for each")
        self._check_latents(latents, 1, total, size)
        self._check_length(total, fps)
        if num_cached_blocks is None:
            cached = self.sampler.num_cached_blocks
        elif (
            isinstance(num_cached_blocks, bool)
            or not isinstance(num_cached_blocks, int | np.integer)
            or num_cached_blocks < 0
        ):
            raise UserError(
                f"num_cached_blocks {num_cached_blocks!r} is not allowed; choose 1 or more blocks, or 0 for all"
            )
        else:
            cached = int(num_cached_blocks) or None
        starts = (*causal_block_starts(total, self.sampler.block_frames), total)
        plan = Plan(starts, None, size, fps, cached, factor)
        if texts is None:
            return plan
        begins = [plan.seconds_of(block) for block in range(plan.blocks)]
        numbers = prompts_of_blocks(texts, begins, plan.frames / fps, say)
        return plan._replace(prompts=BlockPrompts.of_schedule(texts, numbers))

    def _check_length(self, total: int, fps: float) -> None:
        limit, factor = self.transformer.config.rope_max_seq_len, self.autoencoder.temporal_factor
        if total > limit:
            most = pixel_frames(limit, factor)
            raise UserError(
                f"{pixel_frames(total, factor)} frames are {total} latent frames, and the model has rotary positions "
                f"for {limit} (rope_max_seq_len); allowed are at most {most} frames, {most / fps:g} seconds: make it "
                "shorter, or make several videos"
            )

    def token_grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of tokens of a frame."""
        _, *patch = self.transformer.config.patch_size
        return tuple(length // (self.autoencoder.spatial_factor * own) for length, own in zip(size.sampled, patch))

    def _say_plan(self, plan: Plan, say: Callable[[str], None]) -> None:
        config, grid, dtype = self.transformer.config, self.token_grid(plan.size), self.transformer.dtype
        check_positions(0, (plan.latent_frames, *grid), config.rope_max_seq_len)
        first = plan.starts[1]
        later = "" if plan.blocks == 1 else f", then {plan.blocks - 1} of {self.sampler.block_frames}"
        say(
            f"{plan.frames} frames, {plan.frames / plan.fps:g} seconds at {plan.fps:g} per second: "
            f"{plan.latent_frames} latent frames in {counted(plan.blocks, 'block')}, the first of {first}{later}"
        )
        own = state_bytes(config, grid, num_cached_blocks=plan.num_cached_blocks, dtype=dtype)
        cache = kv_cache_bytes(config, grid, plan.latent_frames, dtype=dtype)
        seen = "all earlier blocks" if plan.num_cached_blocks is None else f"{plan.num_cached_blocks} earlier blocks"
        say(
            f"state: {readable_bytes(own.per_layer)} per layer, {readable_bytes(own.total)} in all, whatever the "
            f"length, with {seen} in sight; keys and values of this video would take {readable_bytes(cache)} per layer"
        )
        if plan.latent_frames > TRAINED_LATENT_FRAMES:
            say(
                f"longer than the {TRAINED_LATENT_FRAMES} latent frames (about a minute) that the published LongSANA "
                "was trained on: colours and shapes may drift"
            )

    def _settings(self, plan: Plan, seed: int, request: VideoRequest, latents: Any, enlarge: int) -> dict[str, Any]:
        """All but the prompts that decides what the frames are, for comparing with those of an earlier call."""
        instruction = request.complex_human_instruction
        networks = {TRANSFORMER: self.transformer, TEXT: self.text_encoder, AUTOENCODER: self.autoencoder}
        names = {TRANSFORMER: [self.checkpoint_id, self.weights, self.checkpoint_step]}
        return {
            "frames": plan.frames,
            "seed": seed,
            "height, width": list(plan.size.requested),
            "sampled height, width": list(plan.size.sampled),
            "num_cached_blocks": plan.num_cached_blocks,
            "fps": plan.fps,
            "motion_score": request.motion_score,
            "max_sequence_length": request.max_sequence_length,
            "complex_human_instruction": None if instruction is None else list(instruction),
            "prompt_embeds": digest(request.prompt_embeds, request.prompt_attention_mask),
            "latents": digest(latents),
            "enlarge": enlarge,
            "sampler": str(self.sampler),
            "transformer": str(self.transformer.config),
            **weights_settings(networks, self.networks, names),
            **self.lora_settings(),
        }

    # -- programs ------------------------------------------------------------------------------------------------

    def block_program(self, watch: Stopwatch, arguments: tuple) -> Callable[..., tuple[Array, SanaVideoState]]:
        """(params, lora, state, start, key, conditions, first frame) -> (clean latents, state), for one block's shape.

        The state's memory goes to the state that comes back.
        """
        transformer, sampler = self.transformer, self.sampler

        def run(params, lora, state, start, key, conditions, first_frame):
            variables = transformer_variables(params, lora)

            def velocity(latents, timestep, state):
                times = jnp.broadcast_to(timestep, latents.shape[:1])
                inputs = (variables, latents, conditions.embeds, times, conditions.mask)
                output, state = transformer.apply(*inputs, state=state, first_frame=first_frame)
                return output.astype(jnp.float32), state

            block = generate_block(velocity, state, start, sampler, key)
            return block, read_block(velocity, state, block)

        name = f"the transformer for blocks of latents {'x'.join(map(str, arguments[3].shape))}"
        what = "long video", sampler
        program = self.programs.get(name, what, run, *arguments, donate=(2,), identity=transformer)
        self._check_budget(program, 1)
        return watch.compiled(program)


def _check_residency(residency: Residency) -> None:
    if residency == "one_at_a_time":
        raise UserError(
            "residency 'one_at_a_time' (--low-memory) would read the weights anew in every block, since LongSANA "
            "decodes each block before the next; allowed are text_encoder_freed and all: leave it out"
        )


def _texts(prompt: Any, embeds: Any) -> tuple[PromptSwitch, ...] | None:
    if (prompt is None) == (embeds is None):
        given = "neither" if prompt is None else "both"
        raise UserError(f"prompt and prompt_embeds: {given} given; exactly one is allowed: give one of them")
    if prompt is None and np.shape(embeds)[:1] != (1,):
        raise UserError(f"prompt_embeds of shape {np.shape(embeds)}; allowed is (1, L, C), for one prompt: give one")
    return None if prompt is None else parse_prompts(prompt)
