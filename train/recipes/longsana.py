"""LongSANA's training: causal blocks, the start of a few-step generator, and self-forcing of it; the last two are also
those of SANA-WM's streaming student.

SANA-Video, arXiv 2509.24695, §4; the losses are in ``train.objectives.longsana``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from configs.longsana import ChunkCausalConfig, OdeInitializationConfig, SelfForcingConfig
from configs.schema import RunConfig
from kernels.typing import Array, Float, PRNGKeyArray, PyTree
from sana_jax.autoencoders import VideoAutoencoder
from sana_jax.diffusion.samplers import LongSanaSampler, Sampler, WorldStreamSampler
from sana_jax.diffusion.samplers.longsana import causal_block_starts, generate_block, read_block
from sana_jax.diffusion.sampling import sample_scan
from sana_jax.models.sana_video import SanaVideoTransformer
from sana_jax.models.sharding_rules import Rule
from sana_jax.pipelines.long_video import ATTENTION_EPSILON
from sana_jax.pipelines.sampling_function import Encoded, StepGuidance, VideoNetwork, guided_velocity, is_guided
from train.batch import Batch
from train.longsana_step import AVERAGED, STREAM, SelfForcingSteps, stream_tree
from train.networks import network_conditions, sharding_rules
from train.objectives.longsana.chunk_causal import ChunkCausal
from train.objectives.longsana.networks import (
    Captions,
    Transformer,
    block_network,
    captions_of,
    empty_state,
    score_network,
)
from train.objectives.longsana.ode import OdeInitialization
from train.objectives.longsana.self_forcing import SelfForcing
from train.objectives.longsana.streaming import StreamingSelfForcing
from train.objectives.longsana.windows import Windows
from train.phases import PhaseOptimizers, part
from train.recipes.base import NullEncoding, Prompts, SamplingFunction
from train.recipes.whole import WholeTransformer
from train.recipes.world_distill import world_few_step_sampling
from train.sharding import BATCH_AXES, replicated
from train.step import StepFunction, make_train_step


def causal_network(transformer: Transformer) -> Transformer:
    """The transformer as its few-step generator computes it: LongSANA with a smaller number in the divisor of its
    attention, SANA-WM as it is."""
    if not isinstance(transformer, SanaVideoTransformer):
        return transformer
    return transformer.clone(attention_epsilon=ATTENTION_EPSILON)


@dataclass(frozen=True)
class ChunkCausalTraining(WholeTransformer):
    """Flow matching in causal blocks, with a noise level for each; ``trained`` is the transformer's parameters.

    Attributes:
        chunks: blocks and their levels.
    """

    chunks: ChunkCausalConfig = dataclasses.field(default_factory=ChunkCausalConfig)

    kind: ClassVar[str] = "chunk_causal"

    def notes(self, learning_rate: float | None, base: PyTree | None) -> list[str]:
        """What the run's directory is for."""
        return [
            f"causal blocks of {self.chunks.block_frames} latent frames: previews are drawn so; the model is where ODE "
            "initialisation begins (--model), and no pipeline samples it by itself"
        ]

    def velocity(
        self, trained: PyTree, frozen: None, noisy: Array, timestep: Array, batch: Batch, draws: PyTree
    ) -> Float[Array, "B T H W C"]:
        """The prediction of the network in causal blocks."""
        starts = causal_block_starts(noisy.shape[1], self.chunks.block_frames)
        return score_network(self.transformer, starts)(trained, noisy, timestep, captions_of(batch))

    def step_functions(
        self, config: RunConfig, optimizer: Any, null_encoding: NullEncoding
    ) -> tuple[StepFunction, ...]:
        """One."""
        objective = ChunkCausal(self, config.flow, *null_encoding, chunks=self.chunks)
        return (make_train_step(objective, optimizer, config),)

    def sampling_function(self, sampler: Sampler, num_inference_steps: int, guidance_scale: float) -> SamplingFunction:
        """Guided sampling of whole clips, in causal blocks that share their noise level."""
        schedule = sampler.schedule(num_inference_steps)
        network = VideoNetwork(self.transformer, self.chunks.block_frames)

        def function(
            trained: PyTree, frozen: PyTree, latents: Array, prompts: Prompts, conditions: Mapping[str, Array]
        ) -> Float[Array, "B T H W C"]:
            positive = Encoded(prompts.embeds, prompts.mask)
            negative = Encoded(prompts.null_embeds, prompts.null_mask) if is_guided(guidance_scale) else None

            def velocity(noisy, timestep):
                guidance = StepGuidance(positive, negative, guidance_scale)
                return guided_velocity(network, trained, noisy, timestep, guidance)

            return sample_scan(sampler, schedule, velocity, latents, None).latents

        return function


@dataclass(frozen=True)
class OdeTraining(WholeTransformer):
    """Regression onto the teacher's trajectories; ``trained`` is the transformer's parameters.

    Attributes:
        ode: steps, table and blocks.
    """

    ode: OdeInitializationConfig = dataclasses.field(default_factory=OdeInitializationConfig)

    def notes(self, learning_rate: float | None, base: PyTree | None) -> list[str]:
        """Where the steps are."""
        steps = ", ".join(map(str, self.ode.timesteps))
        return [f"ODE initialisation: causal blocks of {self.ode.block_frames} latent frames, from timesteps {steps}"]

    def step_functions(
        self, config: RunConfig, optimizer: Any, null_encoding: NullEncoding
    ) -> tuple[StepFunction, ...]:
        """One."""

        def network(params, noisy, timestep, captions):
            starts = self.ode.block_starts(noisy.shape[1])
            return score_network(self.transformer, starts)(params, noisy, timestep, captions)

        return (make_train_step(OdeInitialization(network, self.ode), optimizer, config),)

    def sampling_function(
        self, sampler: LongSanaSampler | WorldStreamSampler, num_inference_steps: int, guidance_scale: float
    ) -> SamplingFunction:
        """Few-step sampling, block after block."""
        sample = few_step_sampling(self.transformer, sampler)
        return lambda trained, frozen, *inputs: sample(trained, *inputs)


@dataclass(frozen=True)
class SelfForcingTraining:
    """Learning from the generator's own videos.

    ``trained`` is the tree of ``train.objectives.longsana.self_forcing`` and, with windows, of ``.streaming``;
    ``frozen`` is the real score's parameters and, with windows, the autoencoder's beside them.

    Attributes:
        transformer: the generator, which is sampled.
        score: both score networks'.
        config: of the losses.
        batch: a batch of the data as shapes, after which the stream of windows is shaped; None before the data is
            there, and where there are no windows. Steps without are those on whole videos.
        autoencoder: of the latents, likewise.
    """

    transformer: Transformer
    score: Transformer
    config: SelfForcingConfig
    batch: Batch | None = None
    autoencoder: VideoAutoencoder | None = None

    keeps_base: ClassVar[bool] = True
    copies_base: ClassVar[bool] = True
    kind: ClassVar[str] = "self_forcing"

    @property
    def conditions(self) -> tuple[str, ...]:
        """Those that the network reads."""
        return network_conditions(self.transformer.config)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The network's for generator and fake score; what a video leaves is cut as a batch is."""
        own = sharding_rules(self.transformer.config)
        networks = [(f"({name})/({path})", axes) for name in ("transformer", "fake") for path, axes in own]
        kept = (
            (r"stream/state/attention/key_value", (None, None, BATCH_AXES, "tensor", None, None)),
            (r"stream/state/attention/key", (None, None, BATCH_AXES, "tensor", None)),
            (r"stream/state/last_frame", (None, BATCH_AXES, None, None, "tensor")),
            (r"stream/history", (BATCH_AXES, None, None, None, None)),
            (r"stream/(real_)?captions/embeds", (BATCH_AXES, None, None)),
            (r"stream/(real_)?captions/mask", (BATCH_AXES, None)),
        )
        return (*networks, *kept)

    def settings(self) -> dict[str, Any]:
        """The run's scheduler says the rest."""
        return {}

    def notes(self, learning_rate: float | None, base: PyTree | None) -> list[str]:
        """What learns from what, and at which rates."""
        c = self.config
        start = "the base model" if c.generator is None else c.generator
        rate = c.critic_learning_rate or learning_rate
        lines = [
            f"self-forcing: the generator begins as {start}; {c.critic_steps} steps of the fake score for each of it, "
            f"at a learning rate of {rate:g}"
        ]
        if c.stream is not None:
            windows = self._windows
            lines.append(
                f"windows of {windows.window_frames} latent frames, {windows.count} to a video of "
                f"{windows.total_frames}; every step takes the next"
            )
            if skipped := windows.skipped_turns(len(c.cycle)):
                lines.append(
                    f"one step in {len(c.cycle)} is the generator's, which would always meet the same of the "
                    f"{windows.count} windows: every new video begins {skipped} later in the order of steps"
                )
        return lines

    def initialize(self, key: PRNGKeyArray, base: PyTree | None) -> PyTree:
        """Generator and fake score as the base model is; the generator's own start replaces it later."""

        def copy(leaf):
            return jnp.array(leaf, jnp.float32)

        trained = {"transformer": jax.tree.map(copy, base), "fake": jax.tree.map(copy, base)}
        if self.batch is not None:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.batch)
            trained[STREAM] = stream_tree(self._streaming(self._losses(None)).init_stream(zeros))
        return trained

    def averaged(self, trained: PyTree) -> PyTree:
        """The generator."""
        return part(trained, AVERAGED)

    def frozen(self, base: PyTree, mesh: Mesh) -> PyTree:
        """The real score's and, with windows, beside them the autoencoder's, whole on every device."""
        if self.autoencoder is None:
            return base
        params, everywhere = self.autoencoder.training_params(), replicated(mesh)
        if isinstance(jax.tree.leaves(base)[0], jax.ShapeDtypeStruct):
            params = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), params
            )
        else:
            params = jax.device_put(params, everywhere)
        return {"real": base, "autoencoder": params}

    def optimizer(self, config: RunConfig, trained: PyTree) -> PhaseOptimizers:
        """One for the generator and one for the fake score."""
        windows = None if self.config.stream is None else self._windows
        return SelfForcingSteps(self.config, config).optimizers(trained, windows)

    def step_functions(
        self, config: RunConfig, optimizer: PhaseOptimizers, null_encoding: NullEncoding
    ) -> tuple[StepFunction, ...]:
        """A generator's and ``critic_steps`` of the fake score; with windows, as many as it takes to begin again."""
        losses, steps = self._losses(Captions(*null_encoding)), SelfForcingSteps(self.config, config)
        if self.batch is None:
            return steps.on_whole_videos(losses, optimizer)
        return steps.on_windows(self._streaming(losses), optimizer)

    def sampling_function(
        self, sampler: LongSanaSampler | WorldStreamSampler, num_inference_steps: int, guidance_scale: float
    ) -> SamplingFunction:
        """Few-step sampling, block after block."""
        sample = few_step_sampling(self.transformer, sampler)
        return lambda averaged, frozen, *inputs: sample(averaged["transformer"], *inputs)

    @property
    def _windows(self) -> Windows:
        stream = self.config.stream
        return Windows(stream.total_frames, stream.window_frames, stream.overlap_frames, self.config.block_frames)

    def _losses(self, negative: Captions | None) -> SelfForcing:
        return SelfForcing.of_transformers(self.transformer, self.score, self.config, negative)

    def _streaming(self, losses: SelfForcing) -> StreamingSelfForcing:
        return StreamingSelfForcing(losses, self._windows, self.autoencoder.last_frame_encoded)


def few_step_sampling(
    transformer: Transformer, sampler: LongSanaSampler | WorldStreamSampler
) -> Callable[[PyTree, Float[Array, "B T H W C"], Prompts, Mapping[str, Array]], Float[Array, "B T H W C"]]:
    """``fn(params, latents, prompts, conditions)`` -> latents: a whole video, block after block, to be jitted.

    LongSANA's noise between steps is a function of the block alone; ``LongSanaVideoPipeline`` draws its own.
    """
    if isinstance(sampler, WorldStreamSampler):
        return world_few_step_sampling(transformer, sampler)
    network = block_network(transformer)

    def sample(
        params: PyTree, latents: Array, prompts: Prompts, conditions: Mapping[str, Array]
    ) -> Float[Array, "B T H W C"]:
        rows, frames = latents.shape[:2]
        captions = Captions(prompts.embeds, prompts.mask)
        starts, found = causal_block_starts(frames, sampler.block_frames), []
        state = empty_state(transformer, latents.shape, starts, sampler.num_cached_blocks)
        for number, (start, end) in enumerate(zip(starts, (*starts[1:], frames), strict=True)):

            def velocity(noisy, timestep, state, start=start):
                return network(params, noisy, jnp.broadcast_to(timestep, (rows,)), captions, state, start)

            key = jax.random.fold_in(jax.random.key(0), number)
            found.append(generate_block(velocity, state, latents[:, start:end], sampler, key))
            state = read_block(velocity, state, found[-1])
        return jnp.concatenate(found, axis=1)

    return sample
