"""SANA-WM's second stage: LTX-2 refines the first stage's latents, block after block, in constant memory."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, PyTree
from sana_jax.autoencoders.base import VideoAutoencoder, pixel_frames
from sana_jax.compilation import Programs
from sana_jax.contract import Contract
from sana_jax.diffusion.samplers.world_refiner import BLOCK_FRAMES, SIGMAS, SINK_FRAMES, WINDOW_FRAMES, RefinerSampler
from sana_jax.errors import UserError
from sana_jax.models.ltx2 import ROTATED, LTX2VideoTransformer
from sana_jax.models.ltx2_connectors import LTX2Connectors
from sana_jax.models.ltx2_prefix import LTX2Prefix
from sana_jax.pipelines.base import OutputType
from sana_jax.pipelines.checks import OUTPUT_TYPES, as_numbers, check_common_options, check_finite
from sana_jax.pipelines.decoding import as_latents, decoded_videos
from sana_jax.pipelines.residency import (
    AUTOENCODER,
    CONNECTORS,
    TEXT,
    TRANSFORMER,
    Residency,
    check_residency,
    leave,
)
from sana_jax.pipelines.resumed_folder import digest
from sana_jax.pipelines.weights_settings import weights_settings
from sana_jax.pipelines.world_refiner_blocks import (
    block_noise,
    block_place,
    capture_sink,
    denoise_block,
    filled_up,
    read_block,
)
from sana_jax.pipelines.world_refiner_checkpoint import RefinerCheckpoint
from sana_jax.pipelines.world_refiner_run import BlockEndCallback, RefinerRun, refine_whole
from sana_jax.pipelines.world_refiner_streamed import STREAMED_BLOCK, StreamedRefinement
from sana_jax.quantization.choice import QuantizationChoice
from sana_jax.text_encoders.gemma3 import Gemma3TextEncoder
from sana_jax.weights.components import Resident
from sana_jax.weights.streamed import StreamedResident

DEFAULT_FPS, DEFAULT_SEED = 16.0, 42


@dataclasses.dataclass(frozen=True)
class SanaWMRefinerOutput:
    """What a call has made.

    Attributes:
        frames: latents (B, C, T, h, w), the sink's as they were given; or, without the first ``sink_size`` frames of
            pixels, an array (B, F, H, W, 3) in [0, 1] or a list of videos, each a list of PIL images; as asked for.
        block_count: blocks of the video that are refined now.
        finished: whether these are all; False where a callback ended it.
        resumed_blocks: how many of them an earlier run had refined.
        block_seconds: of every block that was refined now, without compiling.
        compile_seconds: of all programs; 0 where they were compiled before.
        device_bytes: what the program that refines a block holds on the device; None where that is not known.
        seconds: of each stage, compiling included: text, refine, decode.
    """

    frames: Any
    block_count: int
    finished: bool
    resumed_blocks: int = 0
    block_seconds: tuple[float, ...] = ()
    compile_seconds: float = 0.0
    device_bytes: int | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)


class SanaWMRefiner:
    """Refines latent videos; compiled programs are kept, one for each combination of shapes.

    Args:
        transformer: LTX-2's video half.
        params: its parameters: a tree, or a ``Resident`` that reads them when they are needed; with a
            ``StreamedResident`` its blocks are copied from host memory as they are needed.
        connectors: from the text encoder's states to the transformer's prompt.
        connectors_params: its parameters.
        text_encoder: reads prompts; None where only ``prompt_embeds`` will be given.
        autoencoder: draws videos from latents; None where latents are wanted.
        residency: which networks stay in memory: see ``sana_jax.pipelines.residency``.
        weights: component -> a short name for its weights' bytes, for telling runs apart.
        contract: what the weights need of the computation; None where they come from nowhere.

    Raises:
        UserError: networks that do not belong together.
    """

    class_name: ClassVar[str] = "SanaWMRefiner"
    made: ClassVar[str] = "videos"

    def __init__(
        self,
        transformer: LTX2VideoTransformer,
        params: PyTree | Resident,
        connectors: LTX2Connectors,
        connectors_params: PyTree | Resident,
        text_encoder: Gemma3TextEncoder | None = None,
        autoencoder: VideoAutoencoder | None = None,
        *,
        residency: Residency = "text_encoder_freed",
        weights: Mapping[str, str] | None = None,
        contract: Contract | None = None,
    ) -> None:
        check_residency(residency)
        self.transformer = transformer
        self.transformer_weights = _resident(TRANSFORMER, params)
        self.connectors = connectors
        self.connectors_weights = _resident(CONNECTORS, connectors_params)
        self.text_encoder = text_encoder
        self.autoencoder = autoencoder
        self.residency = residency
        self.weights = dict(weights or {})
        self.contract = contract
        self.programs = Programs()
        self.compile_seconds = 0.0
        self._device_bytes: int | None = None
        self._check_components()

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: Any = None,
        variant: str | None = None,
        autoencoder: VideoAutoencoder | None = None,
        residency: Residency | None = None,
        stream_blocks: bool = False,
        quantization: QuantizationChoice = None,
        memory: str | None = None,
        frame_size: tuple[int, int] | None = None,
        held_bytes: int = 0,
    ) -> SanaWMRefiner:
        """Reads a refiner's directory, as published (diffusers' ``SanaWMLTX2Refiner``) or converted.

        Args:
            path: the directory, or ``organisation/name`` on the Hub if there is no such directory.
            dtype: ``"float32"`` or ``"bfloat16"``, of all networks but the autoencoder; None takes float32 where a
                network's weights are stored so, else bfloat16.
            variant: of the published weight files: ``"bf16"``, ``"fp16"``.
            autoencoder: of the first stage's pipeline, whose weights are then shared; None takes the directory's, if
                there is one.
            residency: which networks stay in memory: see ``sana_jax.pipelines.residency``; None takes
                ``"text_encoder_freed"``, or what ``memory`` chooses.
            stream_blocks: keeps the transformer's blocks in host memory and copies each to the device while the one
                before it computes, so that two of them are there at a time: 1.4 GB of weights in place of 26 GB.
            quantization: as in ``SanaPipeline.from_pretrained``, for ``transformer``, ``text_encoder``, ``connectors``.
            memory: of the device, as ``"24g"``: one network at a time, the first stage's counted, blocks streamed where
                the transformer does not fit, the text encoder quantised where it does not; see
                ``sana_jax.pipelines.memory_plan``.
            frame_size: height and width in pixels that ``memory`` is to be enough for; None takes the published ones.
            held_bytes: what other networks keep on the device throughout, of ``memory``.

        Raises:
            FileNotFoundError: the directory or one of its files is missing.
            UserError: a file is damaged, a value is not allowed, or the networks do not belong together.
            CheckpointError: weights are missing, damaged, or do not fit.
        """
        from sana_jax.pipelines.world_refiner_opening import open_refiner, refiner_plan

        fit, residency = refiner_plan(memory, residency, frame_size, held_bytes)
        choices = {"dtype": dtype, "variant": variant, "stream_blocks": stream_blocks, "quantization": quantization}
        return cls(**open_refiner(path, autoencoder=autoencoder, **choices, fit=fit), residency=residency)

    def with_autoencoder(self, autoencoder: VideoAutoencoder) -> SanaWMRefiner:
        """The same refiner, weights and programs shared, that draws with this autoencoder.

        Raises:
            UserError: an autoencoder of other latents.
        """
        drawing = copy.copy(self)
        drawing.autoencoder = autoencoder
        drawing._check_components()
        return drawing

    # -- the call ------------------------------------------------------------------------------------------------

    def __call__(
        self,
        latents: Float[Array, "B C T H W"],
        prompt: str | None = None,
        *,
        fps: float = DEFAULT_FPS,
        sink_size: int = SINK_FRAMES,
        seed: int = DEFAULT_SEED,
        block_size: int | None = BLOCK_FRAMES,
        kv_max_frames: int = WINDOW_FRAMES,
        sigmas: Sequence[float] = SIGMAS,
        noise: Float[Array, "B C N H W"] | None = None,
        prompt_embeds: Float[Array, "b L D"] | None = None,
        output_type: OutputType | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        callback_on_block_end: BlockEndCallback | None = None,
        say: Callable[[str], None] = print,
    ) -> SanaWMRefinerOutput:
        """Refines a latent video, or several with one prompt.

        Block b is a function of (seed, b), the prompt and the latents up to its end: a longer video begins alike.

        Args:
            latents: the first stage's, normalised as the transformers see them.
            prompt: what the video shows, usually the first stage's prompt.
            fps: frames of pixels per second.
            sink_size: first latent frames, which every block sees and which stay as they are.
            seed: of the noise, with the block and the video; 0 to 2³² - 1.
            block_size: latent frames of a block. None, all at once, is refused.
            kv_max_frames: latent frames of sink and earlier blocks that a block sees, at most.
            sigmas: noise levels, from the first to 0.
            noise: the noise itself in place of the seed's: unit normal, for all latent frames behind the sink.
            prompt_embeds: an encoded prompt, from ``encode_prompt``, in place of ``prompt``.
            output_type: ``"latent"``, ``"np"`` or ``"pil"``; None for ``"pil"`` where there is an autoencoder, else
                ``"latent"``.
            checkpoint_dir: a folder that keeps every block as it is refined. Called again with the same arguments after
                any end, the pipeline goes on behind the last whole block, and the latents are those that it would have
                had. The folder of another run is refused.
            callback_on_block_end: called as (pipeline, block, {"latents": (B, C, T, h, w)}) after every block that is
                refined now; if it returns False, the call ends there.
            say: prints a line.

        Raises:
            UserError: a value that is not allowed, arguments that exclude one another, or values that stop being
                finite.
        """
        sampler = RefinerSampler(sigmas, block_size, sink_size, kv_max_frames)
        output_type = self._output_type(output_type)
        video = self._latents(latents)
        blocks, drawn = self._asked(video.shape, sampler, seed, noise, prompt, prompt_embeds)
        self.say_untrained(sampler, fps, video.shape[1], say)
        begin, seconds = time.perf_counter(), {}
        self.compile_seconds, self._device_bytes = 0.0, None
        checkpoint, done = None, []
        if checkpoint_dir is not None:
            settings = self.settings(sampler, fps, seed, prompt, prompt_embeds, noise)
            settings = {"latents": [list(video.shape), digest(video)], **settings}
            checkpoint = RefinerCheckpoint(checkpoint_dir, settings, say)
            done = checkpoint.open([(video.shape[0], end - start, *video.shape[2:]) for start, end in blocks])
        finished, block_seconds = list(done), ()
        if len(done) < len(blocks):
            embeds = self.encode_prompt(prompt) if prompt_embeds is None else as_numbers("prompt_embeds", prompt_embeds)
            _spent(seconds, "text", begin)
            begin = time.perf_counter()
            if done:
                say(f"going on behind block {len(done)} of {len(blocks)}, once the blocks before are read again")
            embeds = jnp.broadcast_to(embeds, (video.shape[0], *embeds.shape[1:]))
            run = RefinerRun(self, sampler, video.shape[1], drawn, embeds, fps, dict(enumerate(done)))
            finished, block_seconds = refine_whole(run, self, video, checkpoint, callback_on_block_end, say)
            self._leave(TRANSFORMER)
            _spent(seconds, "refine", begin)
        elif done:
            say(f"{checkpoint.path} has all {len(blocks)} blocks; nothing is refined")
        begin = time.perf_counter()
        whole = np.concatenate([video[:, : sampler.sink_frames], *finished], axis=1)
        frames = self._frames(whole, sampler, output_type)
        _spent(seconds, "decode", begin)
        counts = (len(finished), len(finished) == len(blocks), len(done))
        costs = (tuple(block_seconds), self.compile_seconds, self._device_bytes, seconds)
        return SanaWMRefinerOutput(frames, *counts, *costs)

    def check(
        self,
        shape: tuple[int, ...],
        output_type: OutputType | None = None,
        *,
        prompt: str | None = None,
        fps: float = DEFAULT_FPS,
        sink_size: int = SINK_FRAMES,
        seed: int = DEFAULT_SEED,
        block_size: int | None = BLOCK_FRAMES,
        kv_max_frames: int = WINDOW_FRAMES,
        sigmas: Sequence[float] = SIGMAS,
        noise: Float[Array, "B C N H W"] | None = None,
        prompt_embeds: Float[Array, "b L D"] | None = None,
    ) -> tuple[RefinerSampler, Callable[[int, int], Float[Array, "B T H W C"]]]:
        """Raises what a call with these arguments would raise for latents (B, T, h, w, C) that are not there yet.

        Returns:
            (how the video is cut, (block, frames of it) -> its noise).
        """
        sampler = RefinerSampler(sigmas, block_size, sink_size, kv_max_frames)
        self._output_type(output_type)
        _, drawn = self._asked(shape, sampler, seed, noise, prompt, prompt_embeds)
        self.transformer.config.rotation((1, 1, 1), fps=fps)
        return sampler, drawn

    # -- its steps, also for a first stage whose latents come block by block ---------------------------------------

    def encode_prompt(self, prompt: str) -> Float[Array, "1 L D"]:
        """A prompt as the transformer sees it; the text encoder and the connectors leave memory then.

        Raises:
            UserError: an empty prompt, or a pipeline without a text encoder.
        """
        if self.text_encoder is None:
            raise UserError("this refiner has no text encoder; give prompt_embeds, or read a whole model directory")
        states, mask = self.text_encoder.encode([prompt])
        leave(TEXT, self.residency, self.networks)
        connectors, mask = self.connectors, jnp.asarray(mask)

        def run(params, states, mask):
            return connectors.apply({"params": params}, states, mask)[0]

        name = f"the text connectors for {states.shape[1]} tokens"
        embeds = self._run(name, "connectors", run, self.connectors_weights.params, states, mask)
        leave(CONNECTORS, self.residency, self.networks)
        check_finite("the text connectors", embeds, self.made)
        return embeds

    def start(
        self, sink: Float[Array, "B T H W C"], prompt_embeds: Float[Array, "B L D"], sampler: RefinerSampler, fps: float
    ) -> LTX2Prefix:
        """The state before the first block.

        Args:
            sink: the first stage's latents of the first ``sampler.sink_frames`` frames.
            prompt_embeds: from ``encode_prompt``, one for each video.
            sampler: how the video is cut.
            fps: frames of pixels per second.
        """
        transformer, history = self.transformer, sampler.history_frames
        rotation = transformer.config.rotation(sink.shape[1:4], fps=fps)
        arguments = (self._cast(sink), self._cast(prompt_embeds), rotation)
        if self.streamed is not None:
            return self.streamed.start(*arguments, history)

        def run(params, sink, prompt, rotation):
            return capture_sink(transformer, params, sink, prompt, rotation, history)

        name = f"the refiner's first frames of {'x'.join(map(str, sink.shape))}"
        return self._run(name, ("sink", history), run, self.transformer_weights.params, *arguments)

    def refine(
        self,
        latents: Float[Array, "B T H W C"],
        noise: Float[Array, "B T H W C"],
        block: int,
        prompt_embeds: Float[Array, "B L D"],
        state: LTX2Prefix,
        sampler: RefinerSampler,
        fps: float,
    ) -> Float[Array, "B T H W C"]:
        """A block's refined latents; ``state`` is read and not written.

        Args:
            latents: the first stage's; a last block may have fewer frames than the others.
            noise: unit normal, the same shape.
            block: its index, from 0 behind the sink.
            prompt_embeds: as for ``start``.
            state: what the blocks before have left.
            sampler: how the video is cut.
            fps: frames of pixels per second.
        """
        transformer, frames = self.transformer, latents.shape[1]
        place = block_place(transformer.config, sampler, latents.shape[2:4], block, frames, fps)
        schedule = sampler.schedule(float(transformer.config.timestep_scale_multiplier))
        whole, drawn = (self._cast(filled_up(array, sampler)) for array in (latents, noise))
        arguments = (whole, drawn, self._cast(prompt_embeds), place, state, schedule)
        if self.streamed is not None:
            return self.streamed.refine(*arguments)[:, :frames]

        def run(params, latents, noise, prompt, place, state, schedule):
            return denoise_block(transformer, params, latents, noise, prompt, place, state, schedule)

        name = f"the refiner for blocks of {'x'.join(map(str, whole.shape))}"
        return self._run(name, "refine", run, self.transformer_weights.params, *arguments)[:, :frames]

    def read(
        self,
        refined: Float[Array, "B T H W C"],
        block: int,
        prompt_embeds: Float[Array, "B L D"],
        state: LTX2Prefix,
        sampler: RefinerSampler,
        fps: float,
    ) -> LTX2Prefix:
        """The state after a refined block; takes the memory of ``state``. Arguments as for ``refine``."""
        transformer = self.transformer
        place = block_place(transformer.config, sampler, refined.shape[2:4], block, refined.shape[1], fps)
        whole = self._cast(filled_up(refined, sampler))
        arguments = (whole, self._cast(prompt_embeds), place, state)
        if self.streamed is not None:
            return self.streamed.read(*arguments)

        def run(params, refined, prompt, place, state):
            return read_block(transformer, params, refined, prompt, place, state)

        name = f"the refiner's reading of blocks of {'x'.join(map(str, whole.shape))}"
        return self._run(name, "read", run, self.transformer_weights.params, *arguments, donate=(4,))

    @property
    def streamed(self) -> StreamedRefinement | None:
        """The steps with the transformer's blocks in host memory, where its weights are so."""
        weights = self.transformer_weights
        return (
            StreamedRefinement(self.transformer, weights, self._run) if isinstance(weights, StreamedResident) else None
        )

    @property
    def networks(self) -> dict[str, Resident | None]:
        """Every network's weights; None where there is none."""
        return {
            TEXT: getattr(self.text_encoder, "weights", None),
            CONNECTORS: self.connectors_weights,
            TRANSFORMER: self.transformer_weights,
            AUTOENCODER: getattr(self.autoencoder, "weights", None),
        }

    # -- what a call asks for ------------------------------------------------------------------------------------

    def _check_components(self) -> None:
        text, connectors, transformer = self.text_encoder, self.connectors.config, self.transformer.config
        if connectors.caption_channels != transformer.caption_channels:
            raise UserError(
                f"connectors of width {connectors.caption_channels} for a transformer whose prompts have "
                f"{transformer.caption_channels}; take both from one model"
            )
        if text is not None and (text.embedding_dim, text.state_count) != (
            connectors.caption_channels,
            connectors.text_proj_in_factor,
        ):
            raise UserError(
                f"a text encoder with {text.state_count} states of width {text.embedding_dim} for connectors that take "
                f"{connectors.text_proj_in_factor} of {connectors.caption_channels}; take both from one model"
            )
        registers = connectors.video_connector_num_learnable_registers
        if text is not None and registers and text.max_length % registers:
            raise UserError(
                f"max_sequence_length {text.max_length} is not a multiple of the connectors' {registers} registers; "
                "choose one, such as 1024"
            )
        channels = getattr(self.autoencoder, "latent_channels", transformer.in_channels)
        if channels != transformer.in_channels or transformer.velocity_channels != transformer.in_channels:
            raise UserError(
                f"a transformer from {transformer.in_channels} to {transformer.velocity_channels} channels with an "
                f"autoencoder of {channels}; all must be alike: take them from one model"
            )

    def _output_type(self, output_type: str | None) -> str:
        if output_type is None:
            return "latent" if self.autoencoder is None else "pil"
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type {output_type!r} is not allowed; choose one of {', '.join(OUTPUT_TYPES)}")
        if output_type != "latent" and self.autoencoder is None:
            raise UserError(
                f"output_type {output_type!r} needs an autoencoder, and this refiner has none; choose latent, or give "
                "from_pretrained the first stage's: autoencoder=pipeline.autoencoder"
            )
        return output_type

    def _latents(self, latents: Any) -> Float[np.ndarray, "B T H W C"]:
        channels = self.transformer.config.in_channels
        if np.ndim(latents) != 5 or np.shape(latents)[1] != channels or 0 in np.shape(latents):
            raise UserError(
                f"latents of shape {np.shape(latents)}; allowed is (B, {channels}, T, h, w), none of them 0: give the "
                "first stage's latents"
            )
        # as the network gets them: the sink's frames are returned so
        video = np.asarray(as_numbers("latents", latents).astype(self.transformer.dtype).astype(jnp.float32))
        check_finite("the first stage", video, self.made)
        return np.moveaxis(video, 1, -1)

    def _asked(
        self, shape: tuple[int, ...], sampler: RefinerSampler, seed: int, noise: Any, prompt: Any, embeds: Any
    ) -> tuple[tuple[tuple[int, int], ...], Callable[[int, int], Float[Array, "B T H W C"]]]:
        """Beginning and end of every block, and (block, frames of it) -> its noise."""
        blocks = sampler.blocks(shape[1])
        drawn = self._noise(noise, seed, shape, sampler)
        self._check_prompt(prompt, embeds, shape[0])
        return blocks, drawn

    def _noise(
        self, noise: Any, seed: int, shape: tuple[int, ...], sampler: RefinerSampler
    ) -> Callable[[int, int], Float[Array, "B T H W C"]]:
        """(block, frames of it) -> its noise."""
        check_common_options("latent", 1, seed)
        batch, frames, height, width, channels = shape
        if noise is None:
            size = (sampler.block_frames, height, width, channels)
            return lambda block, count: block_noise(seed, block, batch, size)[:, :count]
        if seed != DEFAULT_SEED:
            raise UserError(f"seed {seed} would not be used, since noise is given; leave one of them out")
        wanted = (batch, channels, frames - sampler.sink_frames, height, width)
        if np.shape(noise) != wanted:
            raise UserError(
                f"noise of shape {np.shape(noise)}; these latents and sink_size={sampler.sink_frames} need {wanted}, "
                "(B, C, T - sink_size, h, w): give noise of that shape"
            )
        given = np.moveaxis(np.asarray(as_numbers("noise", noise), np.float32), 1, -1)
        size = sampler.block_frames
        return lambda block, count: given[:, block * size : block * size + count]

    def _check_prompt(self, prompt: Any, embeds: Any, batch: int) -> None:
        if (prompt is None) == (embeds is None):
            given = "neither" if prompt is None else "both"
            raise UserError(f"prompt and prompt_embeds: {given} given; exactly one is allowed: give one of them")
        if prompt is not None and not isinstance(prompt, str):
            raise UserError(f"prompt {prompt!r} is a {type(prompt).__name__}; allowed is one text: call once for each")
        channels, shape = self.transformer.config.caption_channels, np.shape(embeds)
        fits = embeds is None or (len(shape) == 3 and shape[0] in (1, batch) and shape[1] > 0 and shape[2] == channels)
        if not fits:
            raise UserError(
                f"prompt_embeds of shape {shape}; allowed is (1 or {batch}, L, {channels}): give what "
                "encode_prompt returns"
            )

    def say_untrained(self, sampler: RefinerSampler, fps: float, frames: int, say: Callable[[str], None]) -> None:
        """Lines on what the refiner was not trained for; raises ``UserError`` for a frame rate that is none."""
        config = self.transformer.config
        config.rotation((1, 1, 1), fps=fps)
        if not sampler.is_published:
            published = RefinerSampler()
            say(
                f"the published refiner was trained with sink_size {published.sink_frames}, block_size "
                f"{published.block_frames}, kv_max_frames {published.window_frames} and sigmas {published.sigmas}, not "
                f"with {sampler.sink_frames}, {sampler.block_frames}, {sampler.window_frames} and {sampler.sigmas}"
            )
        seconds = pixel_frames(frames, config.vae_scale_factors[0]) / fps
        if seconds > config.pos_embed_max_pos:
            say(
                f"{seconds:.1f} seconds at {fps:g} frames per second: LTX-2 was trained with positions up to "
                f"{config.pos_embed_max_pos} seconds, and later frames may suffer"
            )

    def settings(
        self, sampler: RefinerSampler, fps: float, seed: int, prompt: str | None, prompt_embeds: Any, noise: Any
    ) -> dict[str, Any]:
        """All that decides what the latents of a first stage become, for telling runs apart; as for a call."""
        networks: dict[str, Any] = {TRANSFORMER: self.transformer}
        if prompt is not None:
            networks |= {TEXT: self.text_encoder, CONNECTORS: self.connectors}
        folders = {TRANSFORMER: "transformer", TEXT: "text_encoder", CONNECTORS: "connectors"}
        names = {name: self.weights[folder] for name, folder in folders.items() if folder in self.weights}
        return {
            "prompt": prompt,
            "prompt_embeds": digest(prompt_embeds),
            "noise": digest(noise),
            "seed": seed if noise is None else None,
            "fps": float(fps),
            "sink_size": int(sampler.sink_frames),
            "block_size": int(sampler.block_frames),
            "kv_max_frames": int(sampler.window_frames),
            "sigmas": list(sampler.sigmas),
            "transformer": self.transformer.config.to_dict(),
            "connectors": self.connectors.config.to_dict(),
            **weights_settings(networks, self.networks, names),
        }

    # -- programs, memory, frames out ----------------------------------------------------------------------------

    def _run(self, name: str, what: Any, function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
        """Runs a function in the program for these shapes, compiled once."""
        networks = self.transformer, self.connectors  # all that the functions close over, but for what ``what`` says
        program = self.programs.get(name, what, function, *arguments, donate=donate, identity=networks)
        self.compile_seconds += program.seconds
        if program.device_bytes is not None and what in ("refine", (STREAMED_BLOCK, ROTATED)):
            beside = 0 if self.streamed is None else self.streamed.weights.bytes_beside_a_block
            self._device_bytes = program.device_bytes + beside
        return program.run(*arguments)

    def _cast(self, array: Any) -> Array:
        return jnp.asarray(array).astype(self.transformer.dtype)

    def _leave(self, name: str) -> None:
        leave(name, self.residency, self.networks)

    def _frames(self, latents: Float[np.ndarray, "B T h w C"], sampler: RefinerSampler, output_type: str) -> Any:
        """Latents as asked for; videos are decoded one after another, and lose the frames that anchor them."""
        if output_type == "latent":
            return as_latents(latents)

        def finish(frames: Float[np.ndarray, "F H W 3"]) -> Float[np.ndarray, "F H W 3"]:
            return frames[sampler.sink_frames :]

        videos = decoded_videos(self.autoencoder, jnp.asarray(latents), output_type, self.made, finish)
        self._leave(AUTOENCODER)
        return videos


def _resident(name: str, params: PyTree | Resident) -> Resident:
    return params if isinstance(params, Resident) else Resident.of(name, params)


def _spent(seconds: dict[str, float], stage: str, begin: float) -> None:
    seconds[stage] = time.perf_counter() - begin
