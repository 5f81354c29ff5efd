"""What ``python -m sana_jax.benchmark`` measures: each case is a function of the setting that returns table rows."""

from __future__ import annotations

import contextlib
import functools
import itertools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.benchmarking.flops import count_products
from kernels.benchmarking.roofline import Cost, roofline
from kernels.benchmarking.timing import Timing, compile_timed, random_like
from sana_jax.autoencoders.base import pixel_frames
from sana_jax.autoencoders.dc_ae import DCDecoder
from sana_jax.autoencoders.dc_ae import init_params as dc_ae_params
from sana_jax.benchmarking.models import (
    VIDEO_FLOW_SHIFT,
    VIDEO_GUIDANCE,
    ImageModel,
    image_model,
    image_pipeline,
    long_video_pipeline,
    prompt,
    random_params,
    video_config,
    video_parts,
    video_pipeline,
    word_tokenizer,
    world_pipeline,
)
from sana_jax.benchmarking.sides import OURS, Run, Setting, add_figures, measure_sides, row_of, rows
from sana_jax.models.sana import SanaConfig, SanaTransformer
from sana_jax.models.sana_video import SanaVideoTransformer
from sana_jax.pipelines.families import abstract_params

CAPTION_TOKENS = 300
VIDEO_STEPS, WORLD_CHUNKS, LONG_BLOCKS = 50, 4, 4

Rows = list[dict[str, Any]]


def _count_tree(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any) -> float:
    return float(sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)))


# -- pictures ----------------------------------------------------------------------------------------------------------


def image_case(name: str, setting: Setting) -> Rows:
    """A text-to-image pipeline: seconds of text, denoising and decoding, for one picture."""
    model = image_model(name, setting.size)
    steps = setting.steps or model.steps
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = word_tokenizer(pathlib.Path(folder) / "tokenizer")
        case = {
            "kind": "image_pipeline",
            "transformer": model.transformer.to_dict(),
            "text_encoder": model.text_encoder.to_dict(),
            "vae": model.autoencoder.to_dict(),
            "tokenizer": str(tokenizer),
            "prompts": [prompt(number) for number in range(setting.repetitions + 1)],
            "pixels": model.pixels,
            "steps": steps,
            "guidance_scale": model.guidance_scale,
            "flow_shift": model.flow_shift,
        }
        samples = measure_sides(functools.partial(_image_side, model, tokenizer, steps, setting), case, setting)
    start = {"case": model.name, "shape": f"1 picture, {steps} steps", "dtype": setting.dtype}
    found = rows(start, samples)
    denoise = row_of(found, "denoise")
    forward = image_forward(model.transformer, setting.dtype)
    arguments = image_inputs(model.transformer, model.guided_batch, model.latent_side, setting.dtype)
    params = abstract_params(SanaTransformer(model.transformer))
    flops = count_products(forward, params, *arguments) * steps
    weights = steps * jnp.dtype(setting.dtype).itemsize * _count_tree(params)
    denoise |= roofline(Cost(flops, float(weights), setting.dtype), setting.peaks, denoise["median_s"])
    add_figures(denoise, s__step=denoise["median_s"] / steps)
    return found


@contextlib.contextmanager
def _image_side(model: ImageModel, tokenizer: pathlib.Path, steps: int, setting: Setting) -> Iterator[Run]:
    pipe = image_pipeline(model, jnp.dtype(setting.dtype), tokenizer, steps)
    numbers = itertools.count()

    def run() -> dict[str, float]:
        return dict(pipe(prompt(next(numbers)), binning="off", output_type="np").seconds)

    yield run
    pipe.programs.clear()


# -- networks alone ----------------------------------------------------------------------------------------------------


def image_inputs(config: SanaConfig, batch: int, side: int, dtype: str) -> tuple[Any, ...]:
    """Shapes of latents, caption and times of a transformer for pictures."""
    latents = jax.ShapeDtypeStruct((batch, side, side, config.in_channels), jnp.float32)
    caption = jax.ShapeDtypeStruct((batch, CAPTION_TOKENS, config.caption_channels), jnp.dtype(dtype))
    return latents, caption, jax.ShapeDtypeStruct((batch,), jnp.float32)


def image_forward(config: SanaConfig, dtype: str) -> Callable:
    """A pass of such a transformer, as a function of parameters and ``image_inputs``."""
    network = SanaTransformer(config, dtype=jnp.dtype(dtype))

    def forward(params: Any, latents: Any, caption: Any, timestep: Any) -> Any:
        guidance = jnp.full(timestep.shape, 0.45) if config.guidance_embeds else None
        mask = jnp.ones(caption.shape[:2], jnp.int32)
        return network.apply({"params": params}, latents, caption, timestep, guidance, mask)

    return forward


def _network_rows(
    name: str, shape: str, forward: Callable, params: Any, inputs: tuple, case: dict[str, Any], setting: Setting
) -> Rows:
    """A function of (params, *inputs), timed with random numbers; ``params`` and ``inputs`` are shapes."""
    compilation: dict[str, float] = {}

    @contextlib.contextmanager
    def ours() -> Iterator[Run]:
        weights = random_params(params, jnp.dtype(setting.dtype))
        arrays = random_like(inputs, 1.0)
        compiled, told = compile_timed(forward, weights, *arrays)
        compilation.update(told)

        def run() -> dict[str, float]:
            begin = time.perf_counter()
            jax.block_until_ready(compiled(weights, *arrays))
            return {"forward": time.perf_counter() - begin}

        yield run

    samples = measure_sides(ours, case, setting)
    found = rows({"case": name, "shape": shape, "dtype": setting.dtype}, samples)
    own = row_of(found, "forward")
    moved = _count_tree(params) * jnp.dtype(setting.dtype).itemsize + _bytes(inputs)
    cost = Cost(count_products(forward, params, *inputs), moved, setting.dtype)
    own |= compilation | roofline(cost, setting.peaks, own["median_s"])
    return found


def network_case(name: str, setting: Setting) -> Rows:
    """One forward pass of an image transformer with guidance, or of SANA-Video's."""
    if name == "video_network":
        return _video_network_case(setting)
    model = image_model("sana", setting.size)
    config, batch, side = model.transformer, model.guided_batch, model.latent_side
    inputs = image_inputs(config, batch, side, setting.dtype)
    case = {"kind": "image_network", "transformer": config.to_dict(), "batch": batch, "side": side,
            "caption_tokens": CAPTION_TOKENS}  # fmt: skip
    forward, params = image_forward(config, setting.dtype), abstract_params(SanaTransformer(config))
    shape = f"batch {batch}, {(side // config.patch_size) ** 2} tokens, caption {CAPTION_TOKENS}"
    return _network_rows(f"network of {model.name}", shape, forward, params, inputs, case, setting)


def _video_network_case(setting: Setting) -> Rows:
    config = video_config(setting.size)
    frames, height, width = (21, 60, 104) if setting.size == "full" else (3, 4, 4)
    if setting.size == "full" and jax.default_backend() == "cpu":
        frames = 5
    batch = 2
    network = SanaVideoTransformer(config, dtype=jnp.dtype(setting.dtype))

    def forward(params: Any, latents: Any, caption: Any, timestep: Any) -> Any:
        mask = jnp.ones(caption.shape[:2], jnp.int32)
        return network.apply({"params": params}, latents, caption, timestep, mask)

    inputs = (
        jax.ShapeDtypeStruct((batch, frames, height, width, config.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((batch, CAPTION_TOKENS, config.caption_channels), jnp.dtype(setting.dtype)),
        jax.ShapeDtypeStruct((batch,), jnp.float32),
    )
    case = {"kind": "video_network", "transformer": config.to_dict(), "batch": batch,
            "latents": [frames, height, width], "caption_tokens": CAPTION_TOKENS}  # fmt: skip
    name = f"network of {'SANA-Video 2B 480p' if setting.size == 'full' else 'tiny video'}"
    shape = f"batch {batch}, {frames} x {height} x {width} latents, caption {CAPTION_TOKENS}"
    return _network_rows(name, shape, forward, abstract_params(network), inputs, case, setting)


def decode_case(name: str, setting: Setting) -> Rows:
    """DC-AE's decoder on one picture: 1024 px on a GPU, 512 px on a CPU."""
    config = image_model("sana", setting.size).autoencoder
    pixels = 16 if setting.size == "tiny" else (512 if jax.default_backend() == "cpu" else 1024)
    side, dtype = pixels // config.spatial_factor, jnp.dtype(setting.dtype)
    network = DCDecoder(config, dtype=dtype)
    params = jax.eval_shape(lambda: dc_ae_params(config, jax.random.key(0)))["decoder"]
    inputs = (jax.ShapeDtypeStruct((1, side, side, config.latent_channels), dtype),)
    case = {"kind": "dc_ae_decode", "vae": config.to_dict(), "side": side}

    def forward(params: Any, latents: Any) -> Any:
        return network.apply({"params": params}, latents)

    return _network_rows("DC-AE f32c32 decoder" if setting.size == "full" else "tiny DC-AE decoder",
                         f"1 picture of {pixels} px", forward, params, inputs, case, setting)  # fmt: skip


# -- videos ------------------------------------------------------------------------------------------------------------


def _caption(channels: int, tokens: int) -> dict[str, np.ndarray]:
    embeds = np.random.default_rng(0).standard_normal((1, tokens, channels), np.float32)
    return {"prompt_embeds": embeds, "prompt_attention_mask": np.ones((1, tokens), np.int32)}


def _only_ours(run: Run, setting: Setting) -> dict[str, Any]:
    return measure_sides(lambda: contextlib.nullcontext(run), {}, _without_torch(setting))


def _without_torch(setting: Setting) -> Setting:
    if setting.against:
        setting.say("this case has no PyTorch side; only ours runs")
    return setting.__class__(**{**vars(setting), "against": False})


def video_case(name: str, setting: Setting) -> Rows:
    """SANA-Video 480p, 81 frames: a few steps are run, from which those of a whole sampling are reckoned."""
    steps = setting.steps or (4 if setting.size == "full" else 2)
    shape, autoencoder, (height, width, frames) = video_parts(setting.size)
    case = {
        "kind": "video_pipeline",
        "transformer": shape.to_dict(),
        "vae": autoencoder.to_dict(),
        "caption_tokens": CAPTION_TOKENS,
        "height": height,
        "width": width,
        "frames": frames,
        "steps": steps,
        "guidance_scale": VIDEO_GUIDANCE,
        "flow_shift": VIDEO_FLOW_SHIFT,
        "image": name == "image_video",
    }
    samples = measure_sides(functools.partial(_video_side, case["image"], steps, setting), case, setting)
    title = "SANA-Video 480p" if setting.size == "full" else "tiny video"
    begun = " from a picture" if case["image"] else ""
    start = {"case": f"{title}{begun}, {frames} frames", "shape": f"1 video, {steps} steps with guidance"}
    found = rows(start | {"dtype": setting.dtype}, samples)
    denoise, decode, total = (row_of(found, stage) for stage in ("denoise", "decode", "total"))
    add_figures(denoise, s__step=denoise["median_s"] / steps)
    reckoned = VIDEO_STEPS * denoise["median_s"] / steps + decode["median_s"]
    total["figures"] = {f"reckoned for {VIDEO_STEPS} steps, without text, s": reckoned} | total["figures"]
    return found


@contextlib.contextmanager
def _video_side(image: bool, steps: int, setting: Setting) -> Iterator[Run]:
    pipe = video_pipeline(setting.size, jnp.dtype(setting.dtype), steps, setting.say, image=image)
    caption = _caption(pipe.transformer.config.caption_channels, CAPTION_TOKENS)
    given = caption | {f"negative_{name}": value for name, value in caption.items()}
    height, width = pipe.defaults.height, pipe.defaults.width
    if image:
        given["image"] = np.full((height, width, 3), (120, 60, 30), np.uint8)
    stages = ("encode", "denoise", "decode") if image else ("denoise", "decode")

    def run() -> dict[str, float]:
        seconds = dict(pipe(**given, binning="off", output_type="np").seconds)
        return {stage: seconds[stage] for stage in stages}

    yield run
    pipe.programs.clear()


def long_video_case(name: str, setting: Setting) -> Rows:
    """LongSANA: frames per second of the blocks after the first, from noise to pixels."""
    pipe = long_video_pipeline(setting.size, jnp.dtype(setting.dtype), setting.say)
    caption = _caption(pipe.transformer.config.caption_channels, CAPTION_TOKENS)
    per_block, factor = pipe.sampler.block_frames, pipe.autoencoder.temporal_factor
    frames = pixel_frames(LONG_BLOCKS * per_block, factor)
    blocks: list[float] = []

    def run() -> dict[str, float]:
        out = pipe(frames=frames, **caption, output_type="np", binning="off", say=setting.say)
        blocks.extend(out.block_seconds[1:])
        return {stage: out.seconds[stage] for stage in ("denoise", "decode")}

    samples = _only_ours(run, setting)
    title = "LongSANA 480p" if setting.size == "full" else "tiny LongSANA"
    start = {"case": title, "dtype": setting.dtype}
    found = rows(start | {"shape": f"{frames} frames in {LONG_BLOCKS} blocks"}, samples)
    kept = blocks[LONG_BLOCKS - 1 :]  # without those of the first run
    later = {**start, "shape": f"{per_block} latent frames", "what": "later block", "implementation": OURS}
    later |= Timing(tuple(kept)).summary()
    add_figures(later, frames__s=per_block * factor / later["median_s"])
    return [*found, later]


def world_case(name: str, setting: Setting) -> Rows:
    """SANA-WM streamed without its refiner: seconds of the chunks after the first, against those that they show."""
    pipe = world_pipeline(setting.size, jnp.dtype(setting.dtype), setting.say)
    caption = _caption(pipe.transformer.config.caption_channels, CAPTION_TOKENS)
    temporal, per_chunk = pipe.autoencoder.temporal_factor, pipe.sampler.block_frames
    frames = pixel_frames(1 + per_chunk * WORLD_CHUNKS, temporal)
    height, width = pipe.defaults.height, pipe.defaults.width
    picture = np.random.default_rng(7).integers(0, 256, (2 * height, 2 * width, 3)).astype(np.uint8)
    poses = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
    poses[:, 2, 3] = 0.05 * np.arange(frames)
    chunks: list[Any] = []

    def run() -> dict[str, float]:
        out = pipe(
            picture, c2w=poses, intrinsics=[float(width), float(width), float(width), float(height)], **caption,
            output_type="np", say=setting.say,
        )  # fmt: skip
        chunks.append(out.chunks[1:])
        return {stage: out.seconds[stage] for stage in ("encode", "denoise", "decode")}

    samples = _only_ours(run, setting)
    title = "SANA-WM 704x1280 streamed" if setting.size == "full" else "tiny SANA-WM streamed"
    start = {"case": title, "dtype": setting.dtype}
    found = rows(start | {"shape": f"{frames} frames in {WORLD_CHUNKS} chunks"}, samples)
    later = [chunk for run in chunks[1:] for chunk in run]
    stages = {"later chunk": [chunk.seconds for chunk in later]}
    stages |= {f"later chunk: {stage}": [chunk.stages[stage] for chunk in later] for stage in ("denoise", "decode")}
    shown = later[0].frames / pipe.fps
    for stage, seconds in stages.items():
        row = {**start, "shape": f"{per_chunk} latent frames", "what": stage, "implementation": OURS}
        row |= Timing(tuple(seconds)).summary()
        add_figures(row, times_real_time=shown / row["median_s"])
        found.append(row)
    layers, passes = pipe.transformer.config.num_layers, len(pipe.sampler.schedule(None).timesteps) + 1
    denoise = row_of(found, "later chunk: denoise")
    add_figures(denoise, s__block_of_the_network=denoise["median_s"] / (layers * passes))
    return found


CASES: dict[str, Callable[[Setting], Rows]] = {
    "sana": functools.partial(image_case, "sana"),
    "sprint": functools.partial(image_case, "sprint"),
    "network": functools.partial(network_case, "network"),
    "decode": functools.partial(decode_case, "decode"),
    "video": functools.partial(video_case, "video"),
    "longsana": functools.partial(long_video_case, "longsana"),
    "world": functools.partial(world_case, "world"),
    "image_video": functools.partial(video_case, "image_video"),
    "video_network": functools.partial(network_case, "video_network"),
    "sana_600m": functools.partial(image_case, "sana_600m"),
}
"""By name, the most asked-for first, since a time limit leaves out what comes last."""
