"""How long one full-width block of SANA-WM takes on a CPU, beside its own matrix products and beside diffusers.

``python -m tests.benchmarks.sana_wm_cpu`` times a block with the gated delta rule and one with softmax on 3 latent
frames of 22 x 40 tokens (17 frames of 704 x 1280 pixels), float32 with softmax's inputs rounded to bfloat16, batch 1,
with a camera and Plücker coordinates and a caption of 300 tokens. Weights are random, N(0, 0.02²).
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import resource
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels.benchmarking.timing import Timing, paired_ratio, time_interleaved
from sana_jax.host_memory import keep_freed_memory
from sana_jax.models.sana_wm import BlockInputs, SanaWMBlock, SanaWMConfig
from sana_jax.models.sana_wm_state import visible_frames
from sana_jax.nn.camera_attention import AttentionInputs, CausalLayout
from sana_jax.nn.ray_transform import ray_transforms
from sana_jax.nn.rope import rope_3d
from tests.benchmarks.sana_cpu import (
    CAPTION_TOKENS,
    array,
    caption_mask,
    compile_timed,
    environment,
    markdown,
    random_like,
)

CONFIG = SanaWMConfig()
GRID = (3, 22, 40)
KINDS = {"delta rule": False, "softmax": True}


def camera_conditions(frames: int) -> np.ndarray:
    """A camera that moves forward."""
    conditions = np.zeros((1, frames, 20), np.float32)
    for frame in range(frames):
        pose = np.eye(4, dtype=np.float32)
        pose[2, 3] = 0.4 * frame
        conditions[0, frame] = [*pose.reshape(-1), 30.0, 30.0, GRID[2] / 2, GRID[1] / 2]
    return conditions


def block_function(softmax: bool, config: SanaWMConfig = CONFIG) -> tuple[Callable[[], jax.Array], dict]:
    """One block of full width, and its compilation."""
    frames, tokens, width = GRID[0], GRID[1] * GRID[2], config.hidden_size
    block, layout = SanaWMBlock(config, softmax), CausalLayout(GRID)
    rotation = rope_3d(GRID, config.linear_head_dim)
    rays = ray_transforms(jnp.asarray(camera_conditions(frames)), GRID[1:], (1, 1), rotation, config.linear_head_dim)
    attention = AttentionInputs(rotation, rays, None, visible_frames((0,), frames, None))
    x, caption = random_like((array(1, frames, tokens, width), array(1, CAPTION_TOKENS, width)), 1.0)
    time, plucker = random_like((array(1, frames, 6, width), array(1, frames, tokens, width)), 1.0)
    inputs = BlockInputs(attention, caption, jnp.asarray(caption_mask()).astype(bool), time, plucker)

    def run(params, x, inputs):
        return block.apply({"params": params}, x, inputs, layout)[0]

    params = jax.eval_shape(lambda: block.init(jax.random.key(0), x, inputs, layout))["params"]
    arguments = (random_like(params), x, inputs)
    compiled, compilation = compile_timed(run, *arguments)
    return functools.partial(compiled, *arguments), compilation


def products_function(softmax: bool, config: SanaWMConfig = CONFIG) -> Callable[[], list[jax.Array]]:
    """The matrix products of one block alone: against weights, and inside its attentions.

    Those inside softmax attention are counted as products with all scores of one head at a time.
    """
    frames, per_frame, width, hidden = GRID[0], GRID[1] * GRID[2], config.hidden_size, config.mlp_hidden
    tokens, heads, size = frames * per_frame, config.num_heads, config.linear_head_dim
    square = array(width, width)
    weights = random_like({
        # qkv and output; three of the camera and its output; gate; Plücker; cross-attention's query and output
        "tokens": [square] * (4 + 4 + 1 + 1 + 2),
        "caption": [square] * 2,
        "expand": array(width, 2 * hidden),
        "contract": array(hidden, width),
        "frames": array(3 * width, width),
    })  # fmt: skip
    inputs = random_like({
        "x": array(tokens, width),
        "caption": array(CAPTION_TOKENS, width),
        "hidden": array(tokens, hidden),
        "neighbours": array(tokens, 3 * width),
        "key": array(frames, heads, per_frame, size),
        "memory": array(frames, heads, size, size),
        "heads": array(heads, tokens, size),
        "caption_heads": array(heads, CAPTION_TOKENS, size),
    }, 1.0)  # fmt: skip

    def delta_rule(inputs, normalised=True):
        """Of a branch: a frame's updates, two of keys where there is a normaliser, and what queries read."""
        key, memory = inputs["key"], inputs["memory"]
        updates = [jnp.einsum("thsd,thse->thde", key, key), jnp.einsum("thsd,thse->thde", key * 2, key)]
        if normalised:
            updates.append(jnp.einsum("thsd,thse->thde", key * 3, key))
        return [*updates, jnp.einsum("thsd,thde->thse", key, memory)]

    def softmax_heads(inputs, normalised=True):
        def one(head):
            return (head @ head.T) @ head

        return [jax.lax.map(one, inputs["heads"])]

    @jax.jit
    def run(weights, inputs):
        x, caption = inputs["x"], inputs["caption"]
        attention = softmax_heads if softmax else delta_rule
        scores = jnp.einsum("hnd,hld->hnl", inputs["heads"], inputs["caption_heads"])
        return [
            *[x @ weight for weight in weights["tokens"]],
            *[caption @ weight for weight in weights["caption"]],
            x @ weights["expand"],
            inputs["hidden"] @ weights["contract"],
            inputs["neighbours"] @ weights["frames"],
            *attention(inputs),
            *attention({name: value * 2 for name, value in inputs.items()}, normalised=False),
            jnp.einsum("hnl,hld->hnd", scores, inputs["caption_heads"]),
        ]

    return functools.partial(run, weights, inputs)


def torch_function(softmax: bool, threads: int, config: SanaWMConfig = CONFIG) -> Callable[[], None]:
    """diffusers' block, with weights of the same distribution."""
    import torch
    from diffusers.models.transformers import transformer_sana_wm as theirs

    torch.set_num_threads(threads)
    kind = theirs._SoftmaxUCPESinglePathLiteLA if softmax else theirs.BidirectionalGDNUCPESinglePathLiteLA
    block = theirs.SanaVideoMSCamCtrlBlock(
        config.hidden_size,
        config.num_attention_heads,
        attn_cls=kind,
        mlp_ratio=config.mlp_ratio,
        qk_norm=True,
        ffn_type=config.ffn_type,
        linear_head_dim=config.linear_head_dim,
        cross_norm=True,
        patch_size=config.patch_size,
        cam_attn_compress=1,
        conv_kernel_size=config.conv_kernel_size,
        use_chunk_plucker_post_attn=True,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    frames, tokens, width = GRID[0], GRID[0] * GRID[1] * GRID[2], config.hidden_size
    rotary = theirs.SanaWMRotaryPosEmbed(config.linear_head_dim, config.patch_size, 1024)(GRID)
    camera = torch.from_numpy(camera_conditions(frames))
    transforms = theirs._prepare_ucpe_ray_transforms(config.linear_head_dim, camera, GRID, config.patch_size, rotary)
    x, plucker = (torch.randn(1, tokens, width, generator=generator) for _ in range(2))
    caption = torch.randn(1, 1, CAPTION_TOKENS, width, generator=generator)
    time = torch.randn(1, 1, frames, 6 * width, generator=generator)
    mask = torch.from_numpy(np.asarray(caption_mask()).astype(np.int16))

    def run() -> None:
        with torch.inference_mode():
            block(x, caption, time, mask, GRID, rotary, None, camera, transforms, plucker)

    return run


def measure_block(kind: str, repetitions: int = 5, torch_threads: int = 2, config: SanaWMConfig = CONFIG) -> dict:
    """One kind of block beside the products, and then diffusers' block beside the products."""
    softmax = KINDS[kind]
    block, compilation = block_function(softmax, config)
    functions = {"block": block, "products": products_function(softmax, config)}
    timings = time_interleaved(functions, repetitions, jax.block_until_ready)
    # PyTorch's threads keep a core busy after its last product, so it is not in the rounds of ours.
    beside = {
        "torch": torch_function(softmax, torch_threads, config),
        "products beside torch": functions["products"],
    }
    timings |= time_interleaved(beside, repetitions, jax.block_until_ready)
    ratios = {
        "torch / products": paired_ratio(timings["torch"], timings["products beside torch"]),
        "block / products": paired_ratio(timings["block"], timings["products"]),
    }
    # each beside the products of its own rounds, so that a change of the machine's speed between them cancels
    ratios["block / torch"] = ratios["block / products"] / ratios["torch / products"]
    return {"timings": timings, "compilation": {"block": compilation}, "ratios": ratios}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sana_wm_cpu", description=__doc__)
    parser.add_argument("--kind", choices=list(KINDS), default="delta rule", help="of block")
    parser.add_argument("--repetitions", type=int, default=5, help="rounds")
    parser.add_argument("--torch-threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures as well")
    options = parser.parse_args(arguments)
    keep_freed_memory("cpu")  # as the commands do; PyTorch has it too
    report = {**environment(), **measure_block(options.kind, options.repetitions, options.torch_threads)}
    timings: dict[str, Timing] = report["timings"]
    report["timings"] = {name: timing.summary() for name, timing in timings.items()}
    report["peak_resident_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(markdown(report, f"{options.kind}, float32, batch 1, 3 x 22 x 40 tokens, caption of 300 tokens"))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
