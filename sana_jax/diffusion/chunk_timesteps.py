"""Noise levels for video training, where chunks of frames carry different levels.

A causal video model denoises chunk after chunk, so in training a chunk must never be cleaner than the ones before it:
indices are non-decreasing over chunks. ``IncrementalTimesteps`` draws such sequences so that, given one chunk's level,
every non-decreasing continuation is equally likely ("monotonically increasing SNR" of LongSANA and SANA-WM;
AR-Diffusion, arXiv 2503.07418). ``process_timesteps`` turns that and simpler strategies into one index per frame.

Randomness is apart from arithmetic: ``draw_timesteps`` makes every random number a strategy may need, and
``process_timesteps`` is a pure function of them, so that recorded draws can be fed. Indices count the unshifted table
of levels, 0 = clean; ``flow.noise_level`` makes noise levels and timesteps of them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int, PRNGKeyArray
from sana_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS
from sana_jax.diffusion.timesteps import (
    TimestepDensity,
    density_from_draw,
    draw_for_density,
    require_index_density,
    timestep_index,
)
from sana_jax.errors import UserError

STRATEGIES = ("per_sample", "uniform", "incremental", "mixture")
SEQUENCES = ("path_counting", "uniform_below")
MIXTURE_MODES = ("same_t", "incremental", "last_chunk_anchor", "teacher_forcing_clean")


@dataclasses.dataclass(frozen=True)
class IncrementalTimesteps:
    """Random non-decreasing sequences of levels over chunks, uniform over all of them given one fixed entry.

    ``log_upward[t, f]`` is the logarithm of the number of ways to continue from level t at chunk f to the last chunk
    without ever stepping down; ``log_downward[t, f]`` counts the ways from chunk f back to the first chunk without ever
    stepping up. A neighbour's level is then drawn with probability proportional to its count among the levels allowed.

    Attributes:
      num_chunks: F, at least 1.
      num_levels: T, at least 1.
    """

    num_chunks: int
    num_levels: int = NUM_TRAIN_TIMESTEPS

    def __post_init__(self):
        if self.num_chunks < 1 or self.num_levels < 1:
            raise UserError(
                f"num_chunks={self.num_chunks} and num_levels={self.num_levels} must be at least 1; "
                f"the published models use 1 to 40 chunks and {NUM_TRAIN_TIMESTEPS} levels"
            )

    @property
    def log_upward(self) -> np.ndarray:
        """Log counts of continuations upwards, float64 (T, F): N[t, f] = N[t + 1, f] + N[t, f + 1]."""
        return _log_counts(self.num_chunks, self.num_levels)[::-1, ::-1]

    @property
    def log_downward(self) -> np.ndarray:
        """Log counts of continuations downwards, float64 (T, F): N[t, f] = N[t − 1, f] + N[t, f − 1]."""
        return _log_counts(self.num_chunks, self.num_levels)

    def sample(
        self, anchor_chunk: Int[Array, "B"], anchor_level: Int[Array, "B"], uniform: Float[Array, "B F"]
    ) -> Int[Array, "B F"]:
        """Fills a sequence around one known entry, leftwards without stepping up and rightwards without stepping down.

        Args:
          anchor_chunk: which chunk is known, in [0, F).
          anchor_level: its level, in [0, T).
          uniform: U[0, 1) draws; entry f decides chunk f, and the anchor's own entry is not read.

        Returns:
          int32 levels, non-decreasing over the last axis, equal to ``anchor_level`` at ``anchor_chunk``.
        """
        anchor_chunk, anchor_level = jnp.asarray(anchor_chunk, jnp.int32), jnp.asarray(anchor_level, jnp.int32)
        chunks = jnp.arange(self.num_chunks, dtype=jnp.int32)
        none, top = jnp.zeros_like(anchor_level), jnp.full_like(anchor_level, self.num_levels)

        def leftwards(level_right, entry):
            chunk, log_count, draw = entry
            chosen = _categorical(log_count, none, level_right + 1, draw)
            level = jnp.where(chunk < anchor_chunk, chosen, anchor_level)
            return level, level

        def rightwards(level_left, entry):
            chunk, log_count, draw = entry
            chosen = _categorical(log_count, level_left, top, draw)
            level = jnp.where(chunk > anchor_chunk, chosen, anchor_level)
            return level, level

        downward, upward = jnp.asarray(self.log_downward.T), jnp.asarray(self.log_upward.T)
        _, left = jax.lax.scan(leftwards, anchor_level, (chunks, downward, uniform.T), reverse=True)
        _, right = jax.lax.scan(rightwards, anchor_level, (chunks, upward, uniform.T))
        return jnp.where(chunks <= anchor_chunk[:, None], left.T, right.T)


@functools.lru_cache(maxsize=8)
def _log_counts(num_chunks: int, num_levels: int) -> np.ndarray:
    """log N with N[t, 0] = N[0, f] = 1 and N[t, f] = N[t − 1, f] + N[t, f − 1]; float64 (T, F).

    The counts pass 1e300 at a thousand levels, hence logarithms.
    """
    table = np.zeros((num_levels, num_chunks))
    for chunk in range(1, num_chunks):
        table[:, chunk] = np.logaddexp.accumulate(table[:, chunk - 1])
    table.setflags(write=False)
    return table


def _categorical(
    log_weight: Float[Array, "T"], first: Int[Array, "B"], stop: Int[Array, "B"], uniform: Float[Array, "B"]
) -> Int[Array, "B"]:
    """Draws a level in [first, stop) with probability ∝ exp(log_weight), by inverting the cumulative distribution.

    The level is the first one whose cumulative probability exceeds the uniform draw.
    """
    levels = jnp.arange(log_weight.shape[0], dtype=jnp.int32)
    allowed = (levels >= first[:, None]) & (levels < stop[:, None])
    probability = jax.nn.softmax(jnp.where(allowed, log_weight, -jnp.inf), axis=-1)
    not_above = jnp.cumsum(probability, axis=-1) <= uniform[:, None]
    # Rounding may leave the last cumulative probability just below the draw.
    return jnp.minimum(jnp.sum(not_above, axis=-1, dtype=jnp.int32), stop - 1)


@dataclasses.dataclass(frozen=True)
class ChunkMixture:
    """How often each way of giving levels to chunks is used in training (SANA-WM); weights, normalised to sum to 1.

    Attributes:
      same_t: one level for the whole clip.
      incremental: a non-decreasing sequence around a random chunk.
      last_chunk_anchor: a non-decreasing sequence whose last chunk has the drawn level.
      teacher_forcing_clean: as ``last_chunk_anchor``, and then a random number of leading chunks is clean.
    """

    same_t: float = 0.0
    incremental: float = 0.0
    last_chunk_anchor: float = 0.0
    teacher_forcing_clean: float = 0.0

    def __post_init__(self):
        weights = dataclasses.asdict(self)
        if min(weights.values()) < 0 or not sum(weights.values()) > 0:
            raise UserError(f"mixture weights must be at least 0 and not all 0, not {weights}; set one above 0")

    @property
    def upper_bounds(self) -> np.ndarray:
        """Cumulative probabilities of the first three modes of ``MIXTURE_MODES``, float32 (3,)."""
        weights = np.array([getattr(self, mode) for mode in MIXTURE_MODES])
        return np.cumsum((weights / weights.sum()).astype(np.float32), dtype=np.float32)[:-1]


@dataclasses.dataclass(frozen=True)
class ChunkTimesteps:
    """A strategy that gives every frame of a clip its index into the table of levels.

    Attributes:
      num_frames: T, latent frames of a clip.
      chunk_starts: first frame of every chunk, beginning with 0 and increasing; None only with ``per_sample``.
      strategy: ``per_sample``, one index for the clip; ``uniform``, chunks are independent; ``incremental``, a
        non-decreasing sequence over chunks; ``mixture``, drawn per clip from ``mixture``.
      density: density of the drawn levels.
      sequence: how non-decreasing sequences are drawn: ``path_counting``, with ``IncrementalTimesteps``; or
        ``uniform_below``, the last chunk has the drawn level and each earlier chunk a uniform one below the next.
      same_timestep_prob: probability that the whole batch uses one index per clip instead (``uniform``,
        ``incremental``).
      mixture: weights of the strategy ``mixture``.
      image_to_video: the first frame is given, and gets its own index.
      noise_multiplier: that index is uniform in [0, noise_multiplier·num_levels); 0 keeps the first frame clean.
      num_levels: length of the table.

    Raises:
      UserError: for values out of range and for settings that the strategy does not read.
    """

    num_frames: int
    chunk_starts: tuple[int, ...] | None = None
    strategy: str = "per_sample"
    density: TimestepDensity = dataclasses.field(default_factory=TimestepDensity)
    sequence: str = "path_counting"
    same_timestep_prob: float = 0.0
    mixture: ChunkMixture | None = None
    image_to_video: bool = False
    noise_multiplier: float = 0.0
    num_levels: int = NUM_TRAIN_TIMESTEPS

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise UserError(f"strategy {self.strategy!r} is not known; choose one of {', '.join(STRATEGIES)}")
        if self.sequence not in SEQUENCES:
            raise UserError(f"sequence {self.sequence!r} is not known; choose one of {', '.join(SEQUENCES)}")
        require_index_density(self.density)
        if self.chunk_starts is not None:
            object.__setattr__(self, "chunk_starts", tuple(int(start) for start in self.chunk_starts))
        self._check_chunks()
        self._check_settings_are_read()
        if not 0.0 <= self.same_timestep_prob <= 1.0:
            raise UserError(f"same_timestep_prob={self.same_timestep_prob} is no probability; choose one in [0, 1]")
        if not 0.0 <= self.noise_multiplier <= 1.0:
            raise UserError(f"noise_multiplier={self.noise_multiplier} must lie in [0, 1]; 0 keeps the frame clean")

    def _check_chunks(self) -> None:
        if self.num_frames < 1:
            raise UserError(f"num_frames={self.num_frames} must be at least 1; count latent frames")
        if (self.chunk_starts is None) != (self.strategy == "per_sample"):
            raise UserError(
                f"strategy {self.strategy!r} with chunk_starts={self.chunk_starts}: per_sample takes no chunk_starts, "
                "the other strategies need them; change one of the two"
            )
        starts = (0,) if self.chunk_starts is None else self.chunk_starts
        sizes = np.diff((*starts, self.num_frames))
        if not starts or starts[0] != 0 or (sizes < 1).any():
            raise UserError(
                f"chunk_starts={starts} must begin with 0, increase and stay below num_frames={self.num_frames}; "
                "list the first frame of every chunk"
            )

    def _check_settings_are_read(self) -> None:
        ignored = []
        if self.same_timestep_prob and self.strategy not in ("uniform", "incremental"):
            ignored.append("same_timestep_prob")
        if self.sequence != "path_counting" and self.strategy not in ("incremental", "mixture"):
            ignored.append("sequence")
        if self.noise_multiplier and not self.image_to_video:
            ignored.append("noise_multiplier (without image_to_video)")
        if self.mixture is not None and self.strategy != "mixture":
            ignored.append("mixture")
        if ignored:
            raise UserError(
                f"strategy {self.strategy!r} does not read {', '.join(ignored)}; remove, or change strategy"
            )
        if self.mixture is None and self.strategy == "mixture":
            raise UserError("strategy 'mixture' needs mixture=ChunkMixture(...); give the weights of its four modes")

    @property
    def num_chunks(self) -> int:
        """Number of chunks, 1 for ``per_sample``."""
        return 1 if self.chunk_starts is None else len(self.chunk_starts)

    @property
    def chunk_of_frame(self) -> np.ndarray:
        """Which chunk every frame lies in, int32 (T,)."""
        starts = (0,) if self.chunk_starts is None else self.chunk_starts
        return np.repeat(np.arange(self.num_chunks, dtype=np.int32), np.diff((*starts, self.num_frames)))


class TimestepDraws(NamedTuple):
    """Every random number that a strategy may read, for a batch of B clips of K chunks; the rest is left unread.

    Attributes:
      base: raw draws of the density, (B,): the clip's level where one serves all chunks.
      chunks: raw draws of the density, (B, K): independent levels of chunks.
      anchor: raw draws of the density, (B,): the level around which a sequence is built.
      same_timestep: one U[0, 1) for the batch, (): decides ``same_timestep_prob``.
      mode: U[0, 1), (B,): chooses the mixture's mode.
      anchor_chunk: integers in [0, K), (B,): which chunk has the anchor level.
      path: U[0, 1), (B, K): entry k decides chunk k of a sequence.
      clean_prefix: integers in [1, K), (B,): how many leading chunks teacher forcing makes clean.
      first_frame: integers in [0, num_levels), (B,): index of a given first frame before ``noise_multiplier``.
    """

    base: Float[Array, "B"]
    chunks: Float[Array, "B K"]
    anchor: Float[Array, "B"]
    same_timestep: Float[Array, ""]
    mode: Float[Array, "B"]
    anchor_chunk: Int[Array, "B"]
    path: Float[Array, "B K"]
    clean_prefix: Int[Array, "B"]
    first_frame: Int[Array, "B"]


def draw_timesteps(key: PRNGKeyArray, batch_size: int, settings: ChunkTimesteps) -> TimestepDraws:
    """Makes the draws of ``process_timesteps``; each field has its own stream folded into ``key``."""
    keys = TimestepDraws(*(jax.random.fold_in(key, stream) for stream in range(len(TimestepDraws._fields))))
    batch, per_chunk = (batch_size,), (batch_size, settings.num_chunks)
    return TimestepDraws(
        base=draw_for_density(keys.base, batch, settings.density),
        chunks=draw_for_density(keys.chunks, per_chunk, settings.density),
        anchor=draw_for_density(keys.anchor, batch, settings.density),
        same_timestep=jax.random.uniform(keys.same_timestep, (), jnp.float32),
        mode=jax.random.uniform(keys.mode, batch, jnp.float32),
        anchor_chunk=jax.random.randint(keys.anchor_chunk, batch, 0, settings.num_chunks, jnp.int32),
        path=jax.random.uniform(keys.path, per_chunk, jnp.float32),
        clean_prefix=jax.random.randint(keys.clean_prefix, batch, 1, max(settings.num_chunks, 2), jnp.int32),
        first_frame=jax.random.randint(keys.first_frame, batch, 0, settings.num_levels, jnp.int32),
    )


def process_timesteps(draws: TimestepDraws, settings: ChunkTimesteps) -> Int[Array, "..."]:
    """Gives every frame its index, from recorded or fresh draws.

    Args:
      draws: as ``draw_timesteps`` makes them; fields that the strategy does not read may hold anything.
      settings: the strategy.

    Returns:
      int32 indices into the unshifted table, 0 = clean: (B,) for ``per_sample`` without ``image_to_video``, (B, T)
      otherwise.
    """
    base = _index(draws.base, settings)
    if settings.strategy == "per_sample":
        if not settings.image_to_video:
            return base
        chunks = base[:, None]
    elif settings.strategy == "mixture":
        chunks = _mixture(draws, settings)
    else:
        if settings.strategy == "uniform":
            chunks = _index(draws.chunks, settings)
        else:
            anchor = _index(draws.anchor, settings)
            chunks = _sequence(anchor, draws.anchor_chunk, draws.path, settings)
        chunks = jnp.where(draws.same_timestep < settings.same_timestep_prob, base[:, None], chunks)
    frames = chunks[:, settings.chunk_of_frame]
    if settings.image_to_video:
        frames = frames.at[:, 0].set(first_frame_index(draws.first_frame, settings.noise_multiplier))
    return frames


def sample_timesteps(key: PRNGKeyArray, batch_size: int, settings: ChunkTimesteps) -> Int[Array, "..."]:
    """Fresh indices for a batch: ``process_timesteps`` of ``draw_timesteps``."""
    return process_timesteps(draw_timesteps(key, batch_size, settings), settings)


def first_frame_index(draw: Int[Array, "B"], noise_multiplier: float) -> Int[Array, "B"]:
    """The index of a given first frame, int32: floor(draw·noise_multiplier), the product taken in float32."""
    return jnp.floor(jnp.asarray(draw, jnp.float32) * jnp.float32(noise_multiplier)).astype(jnp.int32)


def _index(draw: Float[Array, "*S"], settings: ChunkTimesteps) -> Int[Array, "*S"]:
    return timestep_index(density_from_draw(draw, settings.density), settings.num_levels)


def _sequence(
    anchor: Int[Array, "B"], anchor_chunk: Int[Array, "B"], path: Float[Array, "B K"], settings: ChunkTimesteps
) -> Int[Array, "B K"]:
    """A non-decreasing sequence over chunks through ``anchor``, (B, K)."""
    if settings.sequence == "path_counting":
        sampler = IncrementalTimesteps(settings.num_chunks, settings.num_levels)
        return sampler.sample(anchor_chunk, anchor, path)
    levels = [anchor]
    for chunk in reversed(range(settings.num_chunks - 1)):
        below = path[:, chunk] * levels[0].astype(path.dtype)
        levels.insert(0, jnp.floor(below).astype(jnp.int32))
    return jnp.stack(levels, axis=1)


def _mixture(draws: TimestepDraws, settings: ChunkTimesteps) -> Int[Array, "B K"]:
    """Levels of chunks whose mode is drawn per clip, (B, K)."""
    mode = jnp.sum(draws.mode[:, None] > settings.mixture.upper_bounds, axis=-1)
    same_t, last_anchor, clean_prefix = (
        mode == MIXTURE_MODES.index("same_t"),
        mode >= MIXTURE_MODES.index("last_chunk_anchor"),
        mode == MIXTURE_MODES.index("teacher_forcing_clean"),
    )
    anchor = _index(draws.anchor, settings)
    last_chunk = settings.num_chunks - 1
    anchor_chunk = jnp.where(last_anchor, last_chunk, draws.anchor_chunk)
    sequence = _sequence(anchor, anchor_chunk, draws.path, settings)
    chunks = jnp.where(same_t[:, None], anchor[:, None], sequence)
    if last_chunk == 0:
        return chunks
    in_prefix = np.arange(settings.num_chunks) < jnp.asarray(draws.clean_prefix)[:, None]
    return jnp.where(clean_prefix[:, None] & in_prefix, 0, chunks)
