"""How long one full-width block of SANA-Video 2B takes on a CPU, beside its own matrix products and beside diffusers.

``python -m tests.benchmarks.sana_video_cpu`` times the bidirectional form and the streaming form on 5 latent frames of
15 x 26 tokens (17 frames of 416 x 240 pixels), float32, batch 1, and a caption of 300 tokens. Weights are random,
N(0, 0.02²).
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

from kernels.benchmarking.timing import Timing, paired_ratio, time_interleaved
from sana_jax.host_memory import keep_freed_memory
from sana_jax.models.sana_video import SanaVideoBlock, SanaVideoConfig, init_state
from sana_jax.nn.attention import mask_to_bias
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

CONFIG = SanaVideoConfig.sana_video_2b_480p()
GRID = (5, 15, 26)


def block_function(streaming: bool = False, config: SanaVideoConfig = CONFIG) -> tuple[Callable[[], jax.Array], dict]:
    """One block of full width, and its compilation."""
    block, tokens, features = SanaVideoBlock(config), GRID[0] * GRID[1] * GRID[2], config.inner_dim
    x, caption, time = array(1, tokens, features), array(1, CAPTION_TOKENS, features), array(1, 1, 6, features)
    rotation = rope_3d(GRID, config.attention_head_dim)
    state = None
    if streaming:
        state = jax.tree.map(lambda leaf: leaf[0], init_state(config, 1, GRID[1:]))

    def run(params, x, caption, bias, time, rotation, state):
        return block.apply({"params": params}, x, caption, bias, time, rotation, GRID, (0,), state)

    bias = mask_to_bias(jnp.asarray(caption_mask()))
    params = jax.eval_shape(
        lambda *inputs: block.init(jax.random.key(0), *inputs, GRID), x, caption, bias, time, rotation
    )["params"]
    arguments = (random_like(params), *random_like((x, caption), 1.0), bias, random_like(time, 1.0), rotation, state)
    compiled, compilation = compile_timed(run, *arguments)
    return functools.partial(compiled, *arguments), compilation


def products_function(config: SanaVideoConfig = CONFIG) -> Callable[[], list[jax.Array]]:
    """The matrix products of one block alone: against weights, and inside both attentions."""
    tokens, features, hidden = GRID[0] * GRID[1] * GRID[2], config.inner_dim, config.mlp_hidden
    heads, size = config.num_attention_heads, config.attention_head_dim
    cross_heads, cross_size = config.num_cross_attention_heads, config.cross_attention_head_dim
    square = array(features, features)
    weights = random_like({
        "tokens": [square] * 6,  # self-attention's q, k, v and output; cross-attention's q and output
        "caption": [square] * 2,
        "expand": array(features, 2 * hidden),
        "contract": array(hidden, features),
        "frames": array(3 * features, features),
    })  # fmt: skip
    inputs = random_like({
        "x": array(tokens, features),
        "caption": array(CAPTION_TOKENS, features),
        "hidden": array(tokens, hidden),
        "neighbours": array(tokens, 3 * features),
        "key": array(heads, tokens, size),
        "value": array(heads, tokens, size),
        "cross_query": array(cross_heads, tokens, cross_size),
        "cross_key": array(cross_heads, CAPTION_TOKENS, cross_size),
        "cross_weights": array(cross_heads, tokens, CAPTION_TOKENS),
    }, 1.0)  # fmt: skip

    @jax.jit
    def run(weights, inputs):
        x, caption = inputs["x"], inputs["caption"]
        summary = jnp.einsum("hnd,hne->hde", inputs["key"], inputs["value"])
        return [
            *[x @ weight for weight in weights["tokens"]],
            *[caption @ weight for weight in weights["caption"]],
            x @ weights["expand"],
            inputs["hidden"] @ weights["contract"],
            inputs["neighbours"] @ weights["frames"],
            jnp.einsum("hnd,hde->hne", inputs["key"], summary),
            jnp.einsum("hnd,hld->hnl", inputs["cross_query"], inputs["cross_key"]),
            jnp.einsum("hnl,hld->hnd", inputs["cross_weights"], inputs["cross_key"]),
        ]

    return functools.partial(run, weights, inputs)


def torch_function(threads: int, config: SanaVideoConfig = CONFIG) -> Callable[[], None]:
    """diffusers' block, with weights of the same distribution."""
    import torch
    from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformerBlock, WanRotaryPosEmbed

    torch.set_num_threads(threads)
    heads, size = config.num_attention_heads, config.attention_head_dim
    block = SanaVideoTransformerBlock(
        config.inner_dim, heads, size, attention_bias=False, mlp_ratio=config.mlp_ratio, qk_norm=config.qk_norm
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    frames, height, width = GRID
    video = torch.zeros(1, 1, frames, height * config.patch_size[1], width * config.patch_size[2])
    rotary = WanRotaryPosEmbed(size, config.patch_size, config.rope_max_seq_len)(video)
    x = torch.randn(1, frames * height * width, config.inner_dim, generator=generator)
    caption = torch.randn(1, CAPTION_TOKENS, config.inner_dim, generator=generator)
    time = torch.randn(1, 1, 6 * config.inner_dim, generator=generator)
    mask = (1 - torch.from_numpy(caption_mask()).float())[:, None] * -10000.0

    def run() -> None:
        with torch.inference_mode():
            block(x, None, caption, mask, time, frames, height, width, rotary)

    return run


def measure_block(repetitions: int = 9, torch_threads: int = 2, config: SanaVideoConfig = CONFIG) -> dict:
    """Both forms of the block beside the products, and then diffusers' block beside the products."""
    functions, compilation = {}, {}
    for name, streaming in (("block", False), ("streaming block", True)):
        functions[name], compilation[name] = block_function(streaming, config)
    functions["products"] = products_function(config)
    timings = time_interleaved(functions, repetitions, jax.block_until_ready)
    # PyTorch's threads keep a core busy after its last product, so it is not in the rounds of ours.
    beside = {"torch": torch_function(torch_threads, config), "products beside torch": functions["products"]}
    timings |= time_interleaved(beside, repetitions, jax.block_until_ready)
    ratios = {"torch / products": paired_ratio(timings["torch"], timings["products beside torch"])}
    for name in ("block", "streaming block"):
        ratios[f"{name} / products"] = paired_ratio(timings[name], timings["products"])
        # each beside the products of its own rounds, so that a change of the machine's speed between them cancels
        ratios[f"{name} / torch"] = ratios[f"{name} / products"] / ratios["torch / products"]
    return {"timings": timings, "compilation": compilation, "ratios": ratios}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sana_video_cpu", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9, help="rounds")
    parser.add_argument("--torch-threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures as well")
    options = parser.parse_args(arguments)
    keep_freed_memory("cpu")  # as the commands do; PyTorch has it too
    report = {**environment(), **measure_block(options.repetitions, options.torch_threads)}
    timings: dict[str, Timing] = report["timings"]
    report["timings"] = {name: timing.summary() for name, timing in timings.items()}
    report["peak_resident_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(markdown(report, "float32, batch 1, 5 x 15 x 26 tokens, caption of 300 tokens"))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
