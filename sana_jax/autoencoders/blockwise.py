"""A video autoencoder's networks as pipelines use them: compiled per shape, block by block and in tiles.

What the autoencoders of different families share. A family says what its networks are, how its latents are normalised,
and how much goes through at once.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, PRNGKeyArray, PyTree
from sana_jax.autoencoders.base import check_frames, check_video, mean_and_log_variance
from sana_jax.autoencoders.tiling import Tiles, tile_starts, tiled_decode, tiled_encode
from sana_jax.compilation import compile_ahead
from sana_jax.component_config import load_from_config
from sana_jax.dtypes import parse_dtype
from sana_jax.errors import UserError
from sana_jax.weights.components import Resident, open_component
from sana_jax.weights.rules import Rule

DOING = {"encoder": "encoding", "decoder": "decoding"}


class BlockwiseVideoAutoencoder:
    """Videos to latents of about unit variance, and back, through networks that are causal along time, or may be.

    Weights are read when they are first needed and dropped by ``free``. Every shape is compiled once and kept. A video
    of many pixels goes through causal networks one latent frame (``temporal_factor`` frames) after another; the result
    is the whole one's. Where even one latent frame stands for too many pixels, frames are cut into tiles, which is
    close to the whole frames' result, not equal to it.

    Args:
        config: the shape.
        weights: parameters ``{"encoder": ..., "decoder": ...}``, and whatever else the family has.
        dtype: compute dtype, float32 or bfloat16; videos and latents are float32 outside.
        tiling: True cuts whatever is larger than a tile, False never cuts, None decides by size.
        tiles: how to cut; None for the family's ``default_tiles``.
        say: prints a line: what is being compiled, and that tiling has set in.

    Raises:
        UserError: another dtype.
    """

    # What a family says of itself. Networks are made of (config, dtype) and called with (x, state).
    family: ClassVar[str]
    class_name: ClassVar[str]
    config_class: ClassVar[type]
    networks: ClassVar[Mapping[str, type[nn.Module]]]
    init_params: ClassVar[Callable[[Any, PRNGKeyArray], PyTree]]
    rules: ClassVar[Callable[[Any], Sequence[Rule]]]
    default_tiles: ClassVar[Tiles]
    narrowest_tile: ClassVar[int] = 1
    """Latents that a decoded tile has at least."""

    def __init__(
        self,
        config: Any,
        weights: Resident,
        dtype: Any = jnp.float32,
        *,
        tiling: bool | None = None,
        tiles: Tiles | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.config = config
        self.weights = weights
        self.dtype = jnp.dtype(parse_dtype(dtype, "autoencoder dtype"))
        self.tiling = tiling
        self.tiles = self.default_tiles if tiles is None else tiles
        # by network, shape, whether the video goes on here, and whether it ends here
        self.programs: dict[tuple[str, tuple[int, ...], bool, bool], jax.stages.Compiled] = {}
        self._states: dict[tuple[str, tuple[int, ...]], PyTree] = {}
        self._say = say

    @classmethod
    def from_params(cls, config: Any, params: PyTree, dtype: Any = jnp.float32, **options: Any) -> Self:
        """An autoencoder of parameters that are there already, of any dtype; options as in the constructor."""
        return cls(config, Resident.of("vae", params), dtype, **options)

    @classmethod
    def from_directory(
        cls, directory: str | os.PathLike[str], *, dtype: Any = None, variant: str | None = None, **options: Any
    ) -> Self:
        """A model directory's ``vae``, published or converted; names and shapes are compared, weights read later.

        Args:
            directory: with ``config.json`` and the weights.
            dtype: of computation and of the parameters; None for float32.
            variant: ``bf16``, ... of published weights.
            options: as in the constructor.

        Raises:
            FileNotFoundError: no ``config.json`` or no weights.
            UserError: a configuration of another class or of another family's member, or a dtype that is not allowed.
            CheckpointError: weights that do not fit or are damaged.
        """

        def load(values: dict[str, Any]) -> Self:
            config = cls.config_class.from_dict(values)
            wanted = jnp.dtype(parse_dtype(jnp.float32 if dtype is None else dtype, "autoencoder dtype"))
            weights = open_component(directory, cls.rules(config), cls.abstract_params(config, wanted), variant=variant)
            return cls(config, weights, wanted, **options)

        return load_from_config(directory, {cls.class_name: load})

    @classmethod
    def abstract_params(cls, config: Any, dtype: jnp.dtype) -> PyTree:
        """The shapes of the parameters, in the dtype that they are kept in."""
        shapes = jax.eval_shape(lambda: cls.init_params(config, jax.random.key(0)))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)

    @property
    def largest_at_once(self) -> int:
        """Pixels, of all frames and videos together, that go through the networks at once.

        More go block by block, and frames of which ``temporal_factor`` have more are cut into tiles.
        """
        raise NotImplementedError

    def _is_causal(self, half: str) -> bool:
        """Whether a network can go on with a video."""
        return True

    def _normalised(self, mean: Array) -> Array:
        """The encoder's means with the statistics of their channels taken out."""
        raise NotImplementedError

    def _denormalised(self, latents: Array) -> Array:
        """The inverse of ``_normalised``, in float32."""
        raise NotImplementedError

    @property
    def spatial_factor(self) -> int:
        """Rows of a frame that one latent row stands for."""
        return self.config.spatial_factor

    @property
    def temporal_factor(self) -> int:
        """Frames that one latent frame, but the first, stands for."""
        return self.config.temporal_factor

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.config.latent_channels

    @property
    def image_channels(self) -> int:
        """Channels of the videos."""
        return self.config.in_channels

    @property
    def decoder_history(self) -> int | None:
        """Latent frames before a latent frame that its decoded frames depend on; None where nobody has said."""
        return None

    def to_config(self) -> dict[str, Any]:
        """What ``vae/config.json`` holds."""
        return self.config.to_dict()

    def free(self) -> None:
        """Drops the weights; they are read again when they are needed."""
        self.weights.free()

    # --- whole videos -----------------------------------------------------------------------------------------------

    def encode(self, videos: Float[Array, "B F H W P"], *, tiling: bool | None = None) -> Float[Array, "B T h w C"]:
        """Videos in [-1, 1] to latents: the mean of their distribution, with the channels' statistics taken out.

        Args:
            videos: 1 + k·``temporal_factor`` frames; height and width are multiples of ``spatial_factor``.
            tiling: overrides the autoencoder's own setting.

        Raises:
            UserError: numbers of frames, sizes or channels that the network does not take.
        """
        return self._normalised(self.posterior(videos, tiling=tiling)[0])

    def posterior(
        self, videos: Float[Array, "B F H W P"], *, tiling: bool | None = None
    ) -> tuple[Float[Array, "B T h w C"], Float[Array, "B T h w C"]]:
        """Mean and logarithm of the variance of the latents' distribution, before the statistics of the channels.

        Arguments and errors are as in ``encode``.
        """
        self._check("encoder", videos)
        check_frames(videos.shape[1], self.temporal_factor, begins=True)
        return mean_and_log_variance(jnp.asarray(self._whole("encoder", videos, tiling)))

    def decode(self, latents: Float[Array, "B T h w C"], *, tiling: bool | None = None) -> Float[Array, "B F H W P"]:
        """Latents to videos of 1 + (T-1)·``temporal_factor`` frames, clamped to [-1, 1].

        Args:
            latents: as ``encode`` gives them, of any number of frames, height and width.
            tiling: overrides the autoencoder's own setting.

        Raises:
            UserError: another number of axes or channels.
        """
        self._check("decoder", latents)
        return jnp.clip(self._whole("decoder", self._denormalised(latents), tiling), -1, 1)

    # --- videos in blocks -------------------------------------------------------------------------------------------

    def encode_frames(
        self, videos: Float[Array, "B F H W P"], state: PyTree | None = None, *, tiling: bool | None = None
    ) -> tuple[Float[Array, "B T h w C"], PyTree]:
        """The next frames of a video to their latents, as ``encode`` would give them for the whole video.

        Args:
            videos: 1 + k·``temporal_factor`` frames where the video begins, then k·``temporal_factor``.
            state: what encoding the frames before these gave, None where the video begins. It is used up: its memory
                goes to the state that comes back.
            tiling: as in ``encode``; the same for all blocks of a video.

        Returns:
            (latents, the state for the next frames).

        Raises:
            UserError: as in ``encode``; a state of another video's size, or one that was used already.
        """
        self._check("encoder", videos)
        check_frames(videos.shape[1], self.temporal_factor, begins=state is None)
        moments, state = self._next("encoder", videos, state, tiling)
        return self._normalised(mean_and_log_variance(jnp.asarray(moments))[0]), state

    def decode_frames(
        self, latents: Float[Array, "B T h w C"], state: PyTree | None = None, *, tiling: bool | None = None
    ) -> tuple[Float[Array, "B F H W P"], PyTree]:
        """The next latent frames of a video to their frames, as ``decode`` would give them for the whole video.

        Args:
            latents: any number of latent frames.
            state: what decoding the latents before these gave, None where the video begins. It is used up: its memory
                goes to the state that comes back.
            tiling: as in ``decode``; the same for all blocks of a video.

        Returns:
            (frames: 1 + (T-1)·``temporal_factor`` where the video begins, then T·``temporal_factor``; the state for
            the next latents). The state's size does not depend on how many frames there were.

        Raises:
            UserError: as in ``decode``; a state of another video's size, or one that was used already.
        """
        self._check("decoder", latents)
        frames, state = self._next("decoder", self._denormalised(latents), state, tiling)
        return jnp.clip(frames, -1, 1), state

    # --- in training --------------------------------------------------------------------------------------------------

    def training_params(self) -> PyTree:
        """The parameters that ``last_frame_encoded`` takes."""
        return self.weights.params

    def last_frame_encoded(self, params: PyTree, latents: Float[Array, "B T h w C"]) -> Float[Array, "B 1 h w C"]:
        """The last frame of a video, decoded and encoded again by itself: a pure function, without tiles.

        A causal decoder takes one latent frame after another, so that memory does not depend on their number.
        """
        decoder, encoder = (self._network(half) for half in ("decoder", "encoder"))

        def decode(latents: Array, state: PyTree | None) -> tuple[Array, PyTree]:
            frames, state = decoder.apply({"params": params["decoder"]}, latents, state)
            return frames[:, -1:].astype(jnp.float32), state

        latents, causal = self._denormalised(latents), self._is_causal("decoder")
        last, state = decode(latents[:, :1] if causal else latents, None)
        if causal and latents.shape[1] > 1:
            rest = jnp.moveaxis(latents[:, 1:], 1, 0)[:, :, None]
            (last, _), _ = jax.lax.scan(lambda carry, frame: (decode(frame, carry[1]), None), (last, state), rest)
        moments, _ = encoder.apply({"params": params["encoder"]}, jnp.clip(last, -1, 1))
        return self._normalised(mean_and_log_variance(moments.astype(jnp.float32))[0])

    # --- inside -----------------------------------------------------------------------------------------------------

    def _check(self, half: str, x: Array) -> None:
        if half == "encoder":
            check_video("videos", x, self.image_channels, self.spatial_factor)
        else:
            check_video("latents", x, self.latent_channels, 1)

    def _pixels(self, half: str, x: Array) -> tuple[int, int, int]:
        """Frames, height and width of what ``x`` is or stands for."""
        frames, height, width = x.shape[1:4]
        if half == "encoder":
            return frames, height, width
        return frames * self.temporal_factor, height * self.spatial_factor, width * self.spatial_factor

    def _tiles_set_in(self, half: str, x: Array, tiling: bool | None, announced: bool = False) -> bool:
        tiling = self.tiling if tiling is None else tiling
        _, height, width = self._pixels(half, x)
        if tiling is None:
            tiling = self._frames_at_once(half, x) * height * width > self.largest_at_once
        if not tiling or not self.tiles.cut(height, width):
            return False
        if not announced:
            self._say(self.tiles.announcement(DOING[half], height, width))
        return True

    def _frames_at_once(self, half: str, x: Array) -> int:
        """The fewest frames that a network takes at once of a video."""
        return self.temporal_factor if self._is_causal(half) else self._pixels(half, x)[0]

    def _in_tiles(self, half: str, x: Array, run: Callable[[Array], Array]) -> np.ndarray:
        if half == "encoder":
            return tiled_encode(run, x, self.spatial_factor, self.tiles)
        return tiled_decode(run, x, self.spatial_factor, self.tiles, self.narrowest_tile)

    def _whole(self, half: str, x: Array, tiling: bool | None, announced: bool = False) -> Array:
        """Runs a network over whole videos."""

        def run(x: Array) -> Array:
            _, height, width = self._pixels(half, x)
            batch = x.shape[0]
            if batch > 1 and batch * self._frames_at_once(half, x) * height * width > self.largest_at_once:
                return jnp.concatenate([run(x[i : i + 1]) for i in range(batch)])
            return self._blocks(half, x, None, ends=True)[0]

        return self._in_tiles(half, x, run) if self._tiles_set_in(half, x, tiling, announced) else run(x)

    def _next(self, half: str, x: Array, state: PyTree | None, tiling: bool | None) -> tuple[Array, PyTree]:
        """Runs a network over the next frames; the state is a tuple with that of every tile."""
        tiled = self._tiles_set_in(half, x, tiling, announced=state is not None)
        count = self._tile_count(half, x) if tiled else 1
        if state is not None and len(state) != count:
            raise self._other_state(half, x)
        before, after = iter([None] * count if state is None else state), []

        def run(x: Array) -> Array:
            out, now = self._blocks(half, x, next(before))
            after.append(now)
            return out

        return self._in_tiles(half, x, run) if tiled else run(x), tuple(after)

    def _tile_count(self, half: str, x: Array) -> int:
        _, *sides = self._pixels(half, x)
        narrowest = self.narrowest_tile * self.spatial_factor if half == "decoder" else 1
        cuts = zip(sides, self.tiles.size, self.tiles.stride)
        return math.prod(len(tile_starts(*cut, narrowest)) for cut in cuts)

    def _blocks(self, half: str, x: Array, state: PyTree | None, ends: bool = False) -> tuple[Array, PyTree]:
        """All frames at once or, where these have too many pixels, those of one latent frame after another."""
        frames = x.shape[1]
        if not self._is_causal(half) or x.shape[0] * math.prod(self._pixels(half, x)) <= self.largest_at_once:
            return self._step(half, x, state, ends)
        length = self.temporal_factor if half == "encoder" else 1
        starts = [0, *range(1 if state is None else length, frames, length), frames]
        parts = []
        for start, end in itertools.pairwise(starts):
            part, state = self._step(half, x[:, start:end], state)
            parts.append(part)
        return jnp.concatenate(parts, 1), state

    def _step(self, half: str, x: Array, state: PyTree | None, ends: bool = False) -> tuple[Array, PyTree]:
        """Runs the compiled network on one block of one shape; where the video ends there is no state after it."""
        x = jnp.asarray(x, jnp.float32)
        params = self.weights.params[half]
        goes_on = state is not None
        expected = self._state_shapes(half, x) if goes_on else None
        if goes_on:
            self._check_state(half, x, state, expected)
        key = (half, x.shape, goes_on, ends)
        if key not in self.programs:
            name = f"{self.family} {DOING[half]} of {'x'.join(map(str, x.shape))}"
            block = "" if ends else ", later block" if goes_on else ", first block"
            self.programs[key] = compile_ahead(
                f"{name}{block}, {self.dtype.name}",
                self._functions[half, ends],
                params,
                x,
                expected,
                say=self._say,
                identity=(self._network(half), ends),
            )
        return self.programs[key](params, x, state)

    def _state_shapes(self, half: str, x: Array) -> PyTree:
        """What the state of videos of this batch and size is, whatever the number of frames."""
        key = (half, (x.shape[0], 1, *x.shape[2:]))
        if key not in self._states:
            first = jax.ShapeDtypeStruct(key[1], jnp.float32)
            self._states[key] = jax.eval_shape(self._functions[half, False], self.weights.params[half], first, None)[1]
        return self._states[key]

    def _check_state(self, half: str, x: Array, state: PyTree, expected: PyTree) -> None:
        shapes = [jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree) for tree in (state, expected)]
        if shapes[0] != shapes[1]:
            raise self._other_state(half, x)
        if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            raise UserError(
                f"{DOING[half]}: this state was used already; allowed is the one that the block before gave, once: "
                "keep what every call returns"
            )

    def _other_state(self, half: str, x: Array) -> UserError:
        return UserError(
            f"{DOING[half]} {tuple(x.shape)}: the state is of another network, dtype, tiling, batch or size; allowed "
            "is what the block before gave: begin the video with state=None"
        )

    def _network(self, half: str) -> nn.Module:
        return self.networks[half](self.config, self.dtype)

    @functools.cached_property
    def _functions(self) -> dict[tuple[str, bool], Callable[[PyTree, Array, PyTree | None], tuple[Array, PyTree]]]:
        def function(half: str, ends: bool) -> Callable:
            network = self._network(half)

            def run(params: PyTree, x: Array, state: PyTree | None) -> tuple[Array, PyTree]:
                out, state = network.apply({"params": params}, x, state)
                return out.astype(jnp.float32), None if ends else state

            return jax.jit(run, donate_argnums=2)

        return {(half, ends): function(half, ends) for half in self.networks for ends in (False, True)}
