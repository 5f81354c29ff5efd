"""How long SANA 1.6B takes on a CPU, beside its own matrix products and beside PyTorch.

``python -m tests.benchmarks.sana_cpu`` times one block of full width; ``--full`` adds the whole network at 512 and
1024 px and diffusers' implementation of it on the same number of threads. Weights are random, N(0, 0.02²).
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import json
import math
import os
import pathlib
import resource
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kernels.benchmarking.report import cpu_name
from kernels.benchmarking.timing import Timing, compile_timed, paired_ratio, random_like, ratio, time_interleaved
from sana_jax.host_memory import keep_freed_memory
from sana_jax.models.sana import SanaBlock, SanaConfig, SanaTransformer
from sana_jax.nn.attention import mask_to_bias

CONFIG = SanaConfig.sana_1600m()
MODELS = {"600m": SanaConfig.sana_600m(), "1600m": CONFIG}
CAPTION_TOKENS, KEPT_TOKENS = 300, 40
LATENT_SIDE = {512: 16, 1024: 32}
TIMESTEP = 999.0


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def caption_mask() -> np.ndarray:
    return (np.arange(CAPTION_TOKENS) < KEPT_TOKENS).astype(np.int32)[None]


# --- one block ------------------------------------------------------------------------------------------------------


def block_function(side: int, config: SanaConfig = CONFIG) -> tuple[Callable[[], jax.Array], dict]:
    """One block of full width on side x side tokens, and its compilation."""
    block, tokens, features = SanaBlock(config), side * side, config.inner_dim
    x, caption = array(1, tokens, features), array(1, CAPTION_TOKENS, features)
    bias, time_vectors = array(1, 1, 1, CAPTION_TOKENS), array(1, 6, features)

    def run(params, x, caption, bias, time_vectors):
        return block.apply({"params": params}, x, caption, bias, time_vectors, (side, side))

    params = jax.eval_shape(
        lambda *arguments: block.init(jax.random.key(0), *arguments, (side, side)), x, caption, bias, time_vectors
    )["params"]
    params = random_like(params)
    x, caption, time_vectors = random_like((x, caption, time_vectors), 1.0)
    arguments = (params, x, caption, mask_to_bias(jnp.asarray(caption_mask())), time_vectors)
    compiled, compilation = compile_timed(run, *arguments)
    return functools.partial(compiled, *arguments), compilation


def block_products_function(side: int, config: SanaConfig = CONFIG) -> Callable[[], list[jax.Array]]:
    """The matrix products of one block alone: against weights, and inside both attentions."""
    tokens, features, hidden = side * side, config.inner_dim, config.mlp_hidden
    heads, size = config.num_attention_heads, config.attention_head_dim
    cross_heads, cross_size = config.num_cross_attention_heads, config.cross_attention_head_dim
    square = array(features, features)
    weights = random_like({
        "tokens": [square] * 6,  # self-attention's q, k, v and output; cross-attention's q and output
        "caption": [square] * 2,
        "expand": array(features, 2 * hidden),
        "contract": array(hidden, features),
    })  # fmt: skip
    inputs = random_like({
        "x": array(tokens, features),
        "caption": array(CAPTION_TOKENS, features),
        "hidden": array(tokens, hidden),
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
            jnp.einsum("hnd,hde->hne", inputs["key"], summary),
            jnp.einsum("hnd,hld->hnl", inputs["cross_query"], inputs["cross_key"]),
            jnp.einsum("hnl,hld->hnd", inputs["cross_weights"], inputs["cross_key"]),
        ]

    return functools.partial(run, weights, inputs)


# --- the whole network ----------------------------------------------------------------------------------------------


def network_params(config: SanaConfig = CONFIG) -> dict:
    model = SanaTransformer(config)
    arguments = (array(1, 2, 2, config.in_channels), array(1, 3, config.caption_channels), array(1))
    shapes = jax.eval_shape(lambda *arrays: model.init(jax.random.key(0), *arrays), *arguments)["params"]
    return random_like(shapes)


def network_function(
    params: dict, side: int, scan_blocks: bool, config: SanaConfig = CONFIG
) -> tuple[Callable[[], jax.Array], dict]:
    """The whole network on a side x side latent, and its compilation."""
    model = SanaTransformer(config, scan_blocks=scan_blocks)
    latent, caption = random_like(
        (array(1, side, side, config.in_channels), array(1, CAPTION_TOKENS, config.caption_channels)), 1.0
    )

    def run(params, latent, caption, timestep, mask):
        return model.apply({"params": params}, latent, caption, timestep, encoder_attention_mask=mask)

    arguments = (params, latent, caption, jnp.full(1, TIMESTEP), jnp.asarray(caption_mask()))
    compiled, compilation = compile_timed(run, *arguments)
    return functools.partial(compiled, *arguments), compilation


def network_products_function(side: int, config: SanaConfig = CONFIG) -> Callable[[], list]:
    """The matrix products of the whole network alone: those of a block, once per layer, and those around the blocks.

    The weights of one block are 312 MB, far more than a cache holds, so using them again is no help.
    """
    block = block_products_function(side, config)
    features = config.inner_dim
    shapes = [  # rows, in, out
        (side * side, config.in_channels, features),
        (CAPTION_TOKENS, config.caption_channels, features),
        (CAPTION_TOKENS, features, features),
        (1, 256, features),
        (1, features, features),
        (1, features, 6 * features),
        (side * side, features, config.out_channels),
    ]
    pairs = random_like([(array(rows, inner), array(inner, out)) for rows, inner, out in shapes])
    outer = jax.jit(lambda pairs: [left @ right for left, right in pairs])

    def run() -> list:
        results = outer(pairs)
        for _ in range(config.num_layers):
            # One block's results at a time are alive, as in the network.
            results = jax.block_until_ready(block())
        return results

    return run


def torch_seconds(
    sides: dict[str, int], repetitions: int, threads: int, config: SanaConfig = CONFIG
) -> dict[str, Timing]:
    """Times diffusers' network, with weights of the same distribution."""
    import torch
    from diffusers import SanaTransformer2DModel

    torch.set_num_threads(threads)
    fields = config.to_dict()
    del fields["_class_name"]
    with torch.device("meta"):
        model = SanaTransformer2DModel(**fields)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    caption = torch.randn(1, CAPTION_TOKENS, config.caption_channels, generator=generator)
    mask = torch.from_numpy(caption_mask())

    def forward(latent):
        with torch.inference_mode():
            return model(latent, caption, torch.full((1,), TIMESTEP), encoder_attention_mask=mask, return_dict=False)

    latents = {
        name: torch.randn(1, config.in_channels, side, side, generator=generator) for name, side in sides.items()
    }
    functions = {name: functools.partial(forward, latent) for name, latent in latents.items()}
    # The same products as beside our network: by their two times one sees whether the machine's speed has changed.
    for name, side in sides.items():
        functions[f"{name}_products"] = network_products_function(side, config)
    return time_interleaved(functions, repetitions, jax.block_until_ready)


# --- the report -----------------------------------------------------------------------------------------------------


def environment() -> dict:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "diffusers", "numpy")}
    return {
        "device": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "versions": versions,
        "load_average": os.getloadavg()[0],
    }


def measure_block(side: int = 32, repetitions: int = 15, config: SanaConfig = CONFIG) -> dict:
    """One block beside its matrix products."""
    block, compilation = block_function(side, config)
    names = {"block": block, "block_products": block_products_function(side, config)}
    timings = time_interleaved(names, repetitions, jax.block_until_ready)
    return {
        "timings": timings,
        "compilation": {"block": compilation},
        "ratios": {"block / products": paired_ratio(timings["block"], timings["block_products"])},
    }


def measure_network(
    repetitions: int = 5,
    scan_blocks: bool = True,
    torch_threads: int = 2,
    config: SanaConfig = CONFIG,
    pixels: Sequence[int] = tuple(LATENT_SIDE),
) -> dict:
    """The network at sizes of ``pixels`` beside its matrix products, then, its weights freed, PyTorch's.

    Ours / PyTorch's is of each beside the products of its own rounds, so that a change of the machine's speed between
    them cancels; "machine beside" is that change.
    """
    latent_sides = {size: LATENT_SIDE[size] for size in pixels}
    params = network_params(config)
    functions, compilation = {}, {}
    for size, side in latent_sides.items():
        name = f"network_{size}"
        functions[name], compilation[name] = network_function(params, side, scan_blocks, config)
        functions[f"{name}_products"] = network_products_function(side, config)
    timings = time_interleaved(functions, repetitions, jax.block_until_ready)
    del params, functions
    gc.collect()
    jax.clear_caches()
    sides = {f"torch_{size}": side for size, side in latent_sides.items()}
    timings |= torch_seconds(sides, repetitions, torch_threads, config)
    ratios = {}
    for size in latent_sides:
        ours, torch = (
            paired_ratio(timings[f"{name}_{size}"], timings[f"{name}_{size}_products"]) for name in ("network", "torch")
        )
        ratios[f"network {size} px / products"] = ours
        ratios[f"network {size} px / torch"] = ours / torch
        products = [timings[f"{name}_{size}_products"] for name in ("network", "torch")]
        ratios[f"machine beside network / machine beside torch, {size} px"] = ratio(*products)
    return {"timings": timings, "compilation": compilation, "ratios": ratios}


def markdown(report: dict, what: str = "float32, batch 1, caption of 300 tokens") -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{report['device']}; {versions}; load average {report['load_average']:.1f} at the start",
        "",
        f"| {what} | median | p10 | p90 | minimum | n | compile | temporary memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["timings"].items():
        seconds = " | ".join(f"{row[key]:.3f} s" for key in ("median_s", "p10_s", "p90_s", "minimum_s"))
        compilation = report["compilation"].get(name)
        rest = f"{compilation['compile_s']:.1f} s | {compilation['temporary_MB']:.0f} MB" if compilation else "| "
        lines.append(f"| {name} | {seconds} | {row['repetitions']} | {rest} |")
    lines += ["", "| ratio | |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in report["ratios"].items()]
    lines += ["", f"Peak resident memory {report['peak_resident_MB']:.0f} MB."]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sana_cpu", description=__doc__)
    parser.add_argument("--full", action="store_true", help="also the whole 1.6B network, and PyTorch (7 GB, minutes)")
    parser.add_argument(
        "--repetitions", type=int, default=5, help="of the whole network; a block gets three times that"
    )
    parser.add_argument(
        "--pixels", type=int, nargs="+", choices=LATENT_SIDE, default=list(LATENT_SIDE), help="of the whole network"
    )
    parser.add_argument("--model", choices=MODELS, default="1600m", help="which network")
    parser.add_argument("--unrolled", action="store_true", help="time the unrolled blocks instead of the scan")
    parser.add_argument("--torch-threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures as well")
    options = parser.parse_args(arguments)
    keep_freed_memory("cpu")  # as the commands do; PyTorch has it too

    report = environment()
    config = MODELS[options.model]
    parts = [measure_block(repetitions=3 * options.repetitions, config=config)]
    if options.full:
        network = measure_network(
            options.repetitions, not options.unrolled, options.torch_threads, config, options.pixels
        )
        parts.append(network)
    for key in ("timings", "compilation", "ratios"):
        report[key] = {name: value for part in parts for name, value in part[key].items()}
    report["timings"] = {name: timing.summary() for name, timing in report["timings"].items()}
    report["peak_resident_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    assert all(math.isfinite(value) for value in report["ratios"].values())
    print(markdown(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
