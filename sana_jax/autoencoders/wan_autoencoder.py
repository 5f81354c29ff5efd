"""The Wan video autoencoder as pipelines use it: weights on disk, compiled per shape, block by block and in tiles."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, PyTree
from sana_jax.autoencoders.tiling import Tiles, tiled_decode, tiled_encode
from sana_jax.autoencoders.wan import (
    WanDecoder,
    WanEncoder,
    check_frames,
    check_video,
    init_params,
    mean_and_log_variance,
)
from sana_jax.autoencoders.wan_config import CLASS_NAME, WanConfig
from sana_jax.compilation import compile_ahead
from sana_jax.component_config import load_from_config
from sana_jax.dtypes import parse_dtype
from sana_jax.errors import UserError
from sana_jax.weights.components import Resident, open_component
from sana_jax.weights.tables.wan import wan_rules

# Pixels, of all frames and videos together, that go through the networks at once; more go block by block, and frames of
# which four have more are cut into tiles. By the compiler's own analysis of Wan 2.1 in float32 on a CPU, four frames of
# 480x832 need 3.8 GB of state and 5.2 GB beside it when decoded, 2.2 GB and 6.9 GB when encoded; 1024x1024 would need
# 2.6 times that, and a tile needs 0.6 GB and 0.9 GB, 0.4 GB and 1.2 GB.
LARGEST_AT_ONCE = 2**21
_NETWORKS = {"encoder": WanEncoder, "decoder": WanDecoder}
_DOING = {"encoder": "encoding", "decoder": "decoding"}


class WanAutoencoder:
    """Videos to latents of about unit variance, and back.

    Weights are read when they are first needed and dropped by ``free``. Every shape is compiled once and kept. A video
    of many pixels goes through the networks one latent frame (``temporal_factor`` frames) after another; the result is
    the whole one's. Where even one latent frame stands for too many pixels (more than four frames of 724x724),
    frames are cut into tiles, which is close to the whole frames' result, not equal to it.

    Args:
        config: the shape.
        weights: parameters ``{"encoder": ..., "decoder": ...}``.
        dtype: compute dtype, float32 or bfloat16; videos and latents are float32 outside.
        tiling: True cuts whatever is larger than a tile, False never cuts, None decides by size.
        tiles: how to cut; None for tiles of 256 pixels that overlap by 64.
        say: prints a line: what is being compiled, and that tiling has set in.

    Raises:
        UserError: another dtype.
    """

    def __init__(
        self,
        config: WanConfig,
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
        self.tiles = Tiles((256, 256), (192, 192)) if tiles is None else tiles
        # by network, shape, whether the video goes on here, and whether it ends here
        self.programs: dict[tuple[str, tuple[int, ...], bool, bool], jax.stages.Compiled] = {}
        self._states: dict[tuple[str, tuple[int, ...]], PyTree] = {}
        self._say = say
        # The pipelines of diffusers multiply by the inverse and divide by it; so do we, to the last bit.
        self._mean = np.float32(config.latents_mean)
        self._inverse_std = np.float32(1) / np.float32(config.latents_std)

    @classmethod
    def from_params(cls, config: WanConfig, params: PyTree, dtype: Any = jnp.float32, **options: Any) -> WanAutoencoder:
        """An autoencoder of parameters that are there already, of any dtype; options as in the constructor."""
        return cls(config, Resident.of("vae", params), dtype, **options)

    @classmethod
    def from_directory(
        cls, directory: str | os.PathLike[str], *, dtype: Any = None, variant: str | None = None, **options: Any
    ) -> WanAutoencoder:
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

        def load(values: dict[str, Any]) -> WanAutoencoder:
            config = WanConfig.from_dict(values)
            wanted = jnp.dtype(parse_dtype(jnp.float32 if dtype is None else dtype, "autoencoder dtype"))
            abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, wanted), abstract)
            weights = open_component(directory, wan_rules(config), abstract, variant=variant)
            return cls(config, weights, wanted, **options)

        return load_from_config(directory, {CLASS_NAME: load})

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
        return self.config.z_dim

    @property
    def image_channels(self) -> int:
        """Channels of the videos."""
        return self.config.in_channels

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

        One latent frame is decoded after another, so that memory does not depend on their number.
        """
        decoder, encoder = (network(self.config, self.dtype) for network in (WanDecoder, WanEncoder))

        def decode(latents: Array, state: PyTree | None) -> tuple[Array, PyTree]:
            frames, state = decoder.apply({"params": params["decoder"]}, latents, state)
            return frames[:, -1:].astype(jnp.float32), state

        latents = self._denormalised(latents)
        last, state = decode(latents[:, :1], None)
        if latents.shape[1] > 1:
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

    # One operation at a time, not in the networks' programs, and with a divisor for every latent: in sight of one for a
    # whole channel the compiler multiplies by its inverse.
    def _normalised(self, mean: Array) -> Array:
        return (mean - self._mean) * self._inverse_std

    def _denormalised(self, latents: Array) -> Array:
        return jnp.asarray(latents, jnp.float32) / jnp.broadcast_to(self._inverse_std, latents.shape) + self._mean

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
            tiling = self.temporal_factor * height * width > LARGEST_AT_ONCE
        if not tiling or not self.tiles.cut(height, width):
            return False
        size, stride = ("x".join(map(str, pair)) for pair in (self.tiles.size, self.tiles.stride))
        if not announced:
            self._say(
                f"{_DOING[half]} {height}x{width} pixels in tiles of {size} every {stride}, to bound memory; "
                "tiling=False does not"
            )
        return True

    def _in_tiles(self, half: str, x: Array, run: Callable[[Array], Array]) -> np.ndarray:
        place = tiled_encode if half == "encoder" else tiled_decode
        return place(run, x, self.spatial_factor, self.tiles)

    def _whole(self, half: str, x: Array, tiling: bool | None) -> Array:
        """Runs a network over whole videos."""

        def run(x: Array) -> Array:
            _, height, width = self._pixels(half, x)
            batch = x.shape[0]
            if batch > 1 and batch * self.temporal_factor * height * width > LARGEST_AT_ONCE:
                return jnp.concatenate([run(x[i : i + 1]) for i in range(batch)])
            return self._blocks(half, x, None, ends=True)[0]

        return self._in_tiles(half, x, run) if self._tiles_set_in(half, x, tiling) else run(x)

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
        _, *size = self._pixels(half, x)
        return math.prod(-(-length // stride) for length, stride in zip(size, self.tiles.stride))

    def _blocks(self, half: str, x: Array, state: PyTree | None, ends: bool = False) -> tuple[Array, PyTree]:
        """All frames at once or, where these have too many pixels, those of one latent frame after another."""
        frames = x.shape[1]
        if x.shape[0] * math.prod(self._pixels(half, x)) <= LARGEST_AT_ONCE:
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
            name = f"Wan {_DOING[half]} of {'x'.join(map(str, x.shape))}"
            block = "" if ends else ", later block" if goes_on else ", first block"
            self.programs[key] = compile_ahead(
                f"{name}{block}, {self.dtype.name}", self._functions[half, ends], params, x, expected, say=self._say
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
                f"{_DOING[half]}: this state was used already; allowed is the one that the block before gave, once: "
                "keep what every call returns"
            )

    def _other_state(self, half: str, x: Array) -> UserError:
        return UserError(
            f"{_DOING[half]} {tuple(x.shape)}: the state is of another network, dtype, tiling, batch or size; allowed "
            "is what the block before gave: begin the video with state=None"
        )

    @functools.cached_property
    def _functions(self) -> dict[tuple[str, bool], Callable[[PyTree, Array, PyTree | None], tuple[Array, PyTree]]]:
        def function(half: str, ends: bool) -> Callable:
            network = _NETWORKS[half](self.config, self.dtype)

            def run(params: PyTree, x: Array, state: PyTree | None) -> tuple[Array, PyTree]:
                out, state = network.apply({"params": params}, x, state)
                return out.astype(jnp.float32), None if ends else state

            return jax.jit(run, donate_argnums=2)

        return {(half, ends): function(half, ends) for half in _NETWORKS for ends in (False, True)}
