"""Forward passes and decoders of the published sizes, as functions and shapes that a compiler takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sana_jax.autoencoders import dc_ae, ltx2, wan
from sana_jax.autoencoders.dc_ae_config import DCAEConfig
from sana_jax.autoencoders.ltx2_config import LTX2AutoencoderConfig
from sana_jax.autoencoders.wan_config import WanConfig
from sana_jax.benchmarking.cases import image_forward, image_inputs
from sana_jax.diffusion.samplers.world_refiner import RefinerSampler
from sana_jax.models import sana_video, sana_wm
from sana_jax.models.gemma import Gemma, GemmaConfig
from sana_jax.models.gemma import init_params as gemma_params
from sana_jax.models.ltx2 import LTX2VideoTransformer
from sana_jax.models.ltx2 import init_params as ltx2_params
from sana_jax.models.ltx2_config import LTX2Config
from sana_jax.models.sana import SanaConfig, SanaTransformer
from sana_jax.models.sana_video import SanaVideoConfig, SanaVideoTransformer
from sana_jax.models.sana_wm import SanaWMConfig, SanaWMTransformer
from sana_jax.models.sana_wm_state import cache_frames
from sana_jax.pipelines.families import abstract_params
from sana_jax.pipelines.long_video import ATTENTION_EPSILON
from sana_jax.pipelines.world_refiner_blocks import BlockPlace, capture_sink, seen_by_block
from sana_jax.quantization.trees import quantizable_layers, quantized_abstract

DTYPE = jnp.bfloat16
CAPTION = 300
Case = tuple[Callable, tuple]


def _array(*shape: int, dtype: Any = DTYPE) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _halves(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: _array(*leaf.shape), tree)


def _mask(caption: Any) -> jax.Array:
    return jnp.ones(caption.shape[:2], jnp.int32)


def image(config: SanaConfig, batch: int, side: int, quantization: str | None = None) -> Case:
    """A transformer for pictures; with ``quantization`` all layers that can be have that format."""
    params = _halves(abstract_params(SanaTransformer(config)))
    if quantization is not None:
        params = quantized_abstract(params, dict.fromkeys(quantizable_layers(params), quantization))
    dtype = jnp.dtype(DTYPE).name
    return image_forward(config, dtype), (params, *image_inputs(config, batch, side, dtype))


def text_encoder() -> Case:
    """Gemma-2 2B, on a prompt and the negative one."""
    config = GemmaConfig()
    network = Gemma(config, dtype=DTYPE)
    params = _halves(jax.eval_shape(lambda: gemma_params(Gemma(config), jax.random.key(0))))
    tokens = _array(2, CAPTION, dtype="int32")
    return (lambda params, ids, mask: network.apply({"params": params}, ids, mask)), (params, tokens, tokens)


def dc_ae_decoder(pixels: int = 1024) -> Case:
    """DC-AE's, of one picture."""
    config = DCAEConfig.f32c32_sana()
    network, side = dc_ae.DCDecoder(config, dtype=DTYPE), pixels // config.spatial_factor
    params = _halves(jax.eval_shape(lambda: dc_ae.init_params(config, jax.random.key(0)))["decoder"])
    return (lambda params, x: network.apply({"params": params}, x)), (params, _array(1, side, side, 32))


def video(frames: int = 21, height: int = 60, width: int = 104) -> Case:
    """SANA-Video 480p with guidance, 81 frames."""
    config = SanaVideoConfig.sana_video_2b_480p()
    network = SanaVideoTransformer(config, dtype=DTYPE)

    def run(params, latents, caption, time):
        return network.apply({"params": params}, latents, caption, time, _mask(caption))

    latents = _array(2, frames, height, width, config.in_channels, dtype="float32")
    caption, time = _array(2, CAPTION, config.caption_channels), _array(2, dtype="float32")
    return run, (_halves(abstract_params(SanaVideoTransformer(config))), latents, caption, time)


def long_video_block(frames: int = 10, height: int = 60, width: int = 104) -> Case:
    """A later block of LongSANA."""
    config = SanaVideoConfig.sana_video_2b_480p()
    network = SanaVideoTransformer(config, dtype=DTYPE, attention_epsilon=ATTENTION_EPSILON)
    grid = height // config.patch_size[1], width // config.patch_size[2]
    state = jax.eval_shape(lambda: sana_video.init_state(config, 1, grid, None, DTYPE))

    def run(params, latents, caption, time, state):
        return network.apply({"params": params}, latents, caption, time, _mask(caption), state=state, first_frame=10)

    latents = _array(1, frames, height, width, config.in_channels, dtype="float32")
    caption, time = _array(1, CAPTION, config.caption_channels), _array(1, dtype="float32")
    return run, (_halves(abstract_params(SanaVideoTransformer(config))), latents, caption, time, state)


def _later_frames(network: Any, params: Any, latents: jax.ShapeDtypeStruct) -> Case:
    """A decoder's next latent frames, with what the ones before have left."""

    def run(params, latents, state):
        return network.apply({"params": params}, latents, state)

    return run, (params, latents, jax.eval_shape(run, params, latents, None)[1])


def wan_decoder(height: int = 60, width: int = 104) -> Case:
    """Wan's, of a later latent frame."""
    config = WanConfig()
    params = _halves(jax.eval_shape(lambda: wan.init_params(config, jax.random.key(0)))["decoder"])
    return _later_frames(wan.WanDecoder(config, dtype=DTYPE), params, _array(1, 1, height, width, config.z_dim))


def ltx2_decoder(frames: int = 3, height: int = 22, width: int = 40) -> Case:
    """LTX-2's, of a later chunk of a world."""
    config = LTX2AutoencoderConfig.published()
    params = _halves(jax.eval_shape(lambda: ltx2.init_params(config, jax.random.key(0)))["decoder"])
    latents = _array(1, frames, height, width, config.latent_channels)
    return _later_frames(ltx2.LTX2Decoder(config, dtype=DTYPE), params, latents)


def _world_inputs(config: SanaWMConfig, frames: int, height: int, width: int) -> tuple:
    sizes = 1, frames, height, width
    latents = _array(*sizes, config.in_channels, dtype="float32")
    caption, time = _array(1, CAPTION, config.caption_channels), _array(1, frames, dtype="float32")
    camera, plucker = _array(1, frames, 20, dtype="float32"), _array(*sizes, config.chunk_plucker_channels)
    return _halves(abstract_params(SanaWMTransformer(config))), latents, caption, time, camera, plucker


def world(frames: int = 21, height: int = 22, width: int = 40) -> Case:
    """SANA-WM on 161 frames of 704 x 1280 at once, without guidance."""
    config = SanaWMConfig()
    network = SanaWMTransformer(config, dtype=DTYPE)

    def run(params, latents, caption, time, camera, plucker):
        return network.apply({"params": params}, latents, caption, time, _mask(caption), camera, plucker)

    return run, _world_inputs(config, frames, height, width)


def world_chunk(frames: int = 3, height: int = 22, width: int = 40) -> Case:
    """A later chunk of a streamed world, which sees the first chunk and the one before."""
    config = SanaWMConfig()
    network = SanaWMTransformer(config, dtype=DTYPE)
    room = cache_frames([1, *[frames] * 4], 2, True)
    state = jax.eval_shape(lambda: sana_wm.init_state(config, 1, (height, width), room, 2, True, dtype=DTYPE))

    def run(params, latents, caption, time, camera, plucker, state):
        inputs = latents, caption, time, _mask(caption), camera, plucker
        return network.apply({"params": params}, *inputs, state=state, first_frame=10)

    return run, (*_world_inputs(config, frames, height, width), state)


def refiner_block(height: int = 22, width: int = 40, caption: int = 256) -> Case:
    """A later block of the refiner, with its sink and a full history."""
    config, sampler = LTX2Config(), RefinerSampler()
    network = LTX2VideoTransformer(config, dtype=DTYPE)
    params = _halves(jax.eval_shape(lambda: ltx2_params(network, jax.random.key(0))))
    latents = _array(1, sampler.block_frames, height, width, config.in_channels)
    sink = _array(1, sampler.sink_frames, height, width, config.in_channels)
    prompt = _array(1, caption, config.caption_channels)
    first = config.rotation((sampler.sink_frames, height, width), fps=16.0)
    state = jax.eval_shape(
        lambda params, sink, prompt: capture_sink(network, params, sink, prompt, first, sampler.history_frames),
        params, sink, prompt,
    )  # fmt: skip
    rotation = config.rotation((sampler.block_frames, height, width), fps=16.0, first_frame=20)
    place = BlockPlace(rotation, first, sampler.block_frames)

    def run(params, latents, prompt, state):
        times = jnp.ones(latents.shape[0], jnp.float32)
        return network.apply({"params": params}, latents, prompt, times, **seen_by_block(latents, place, state))

    return run, (params, latents, prompt, state)


NETWORKS: dict[str, Callable[[], Case]] = {
    "text_encoder": text_encoder,
    "sana_1600m_1024": lambda: image(SanaConfig.sana_1600m(), 2, 32),
    **{
        f"sana_1600m_1024_{name}": functools.partial(image, SanaConfig.sana_1600m(), 2, 32, name)
        for name in ("int8", "fp8", "int4", "nvfp4")
    },
    "sprint_1600m_1024": lambda: image(SanaConfig.sprint_1600m(), 1, 32),
    "dc_ae_decoder_1024": dc_ae_decoder,
    "sana_video_480p": video,
    "longsana_block": long_video_block,
    "wan_decoder_frame": wan_decoder,
    "world": world,
    "world_chunk": world_chunk,
    "refiner_block": refiner_block,
    "ltx2_decoder_chunk": ltx2_decoder,
}
