"""How long Gemma-2 2B takes on a CPU as a text encoder, beside its own matrix products and beside PyTorch.

``python -m tests.benchmarks.gemma_cpu`` times a few layers of full width; ``--full`` all 26 of them and the whole
embedding table (11 GB), once ours and once, ours freed, transformers'. Weights are random, N(0, 0.02²).
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import json
import pathlib
import resource
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels.benchmarking.timing import paired_ratio, ratio, time_interleaved
from sana_jax.host_memory import keep_freed_memory
from sana_jax.models.gemma import Gemma, GemmaConfig, init_params
from sana_jax.text_encoders.gemma import _layer_by_layer_program
from tests.benchmarks.sana_cpu import array, compile_timed, environment, random_like

# A negative prompt or a prompt alone; a prompt behind the instruction.
LENGTHS = (64, 256)


def token_ids(config: GemmaConfig, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, config.vocab_size, (1, length)).astype(np.int32)


def network_function(config: GemmaConfig, params: dict, length: int) -> tuple[Callable[[], jax.Array], dict]:
    """The network on one text of ``length`` tokens in one program, and its compilation."""
    gemma = Gemma(config)
    arguments = (params, token_ids(config, length))
    compiled, compilation = compile_timed(lambda params, ids: gemma.apply({"params": params}, ids), *arguments)
    return functools.partial(compiled, *arguments), compilation


def encoder_function(config: GemmaConfig, params: dict, length: int) -> Callable[[], jax.Array]:
    """The same as the text encoder runs it on a CPU: one layer's program for each layer."""
    run = _layer_by_layer_program(Gemma(config), params, 1, length, f"{length} tokens", print)
    return functools.partial(run, params, token_ids(config, length))


def products_function(config: GemmaConfig, params: dict, length: int) -> Callable[[], list[jax.Array]]:
    """The matrix products alone: against the weights of every layer, and inside the attentions.

    The weights of one layer are 311 MB, far more than a cache holds, so using one layer's again is no help.
    """
    features, hidden, size = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layer = jax.tree.map(lambda leaf: jnp.array(leaf[0]), params["layers"])
    inputs = random_like({
        "x": array(length, features),
        "hidden": array(length, hidden),
        "attended": array(length, heads * size),
        "query": array(kv_heads, heads // kv_heads * length, size),
        "key": array(kv_heads, length, size),
        "weights": array(kv_heads, heads // kv_heads * length, length),
    }, 1.0)  # fmt: skip

    @jax.jit
    def run(layer, inputs):
        attention, mlp = layer["self_attn"], layer["mlp"]
        return [
            *[inputs["x"] @ attention[name]["kernel"] for name in ("q_proj", "k_proj", "v_proj")],
            *[inputs["x"] @ mlp[name]["kernel"] for name in ("gate_proj", "up_proj")],
            inputs["attended"] @ attention["o_proj"]["kernel"],
            inputs["hidden"] @ mlp["down_proj"]["kernel"],
            jnp.einsum("hqd,hkd->hqk", inputs["query"], inputs["key"]),
            jnp.einsum("hqk,hkd->hqd", inputs["weights"], inputs["key"]),
        ]

    def run_all() -> list[jax.Array]:
        for _ in range(config.num_hidden_layers):
            # One layer's results at a time are alive, as in the network.
            results = jax.block_until_ready(run(layer, inputs))
        return results

    return run_all


def torch_functions(config: GemmaConfig, threads: int) -> dict[str, Callable]:
    """transformers' network on the same lengths, with weights of the same distribution."""
    import torch
    from transformers import Gemma2Config, Gemma2Model

    torch.set_num_threads(threads)
    with torch.device("meta"):
        model = Gemma2Model(Gemma2Config(**config.to_dict(), attn_implementation="eager"))
    model = model.to_empty(device="cpu").eval()
    # The meta device has left these two without values.
    model.rotary_emb = type(model.rotary_emb)(model.config)
    model.embed_tokens.embed_scale.fill_(config.hidden_size**0.5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)

    def forward(ids):
        with torch.inference_mode():
            return model(ids, use_cache=False).last_hidden_state

    ids = {length: torch.from_numpy(token_ids(config, length)).long() for length in LENGTHS}
    return {f"torch_{length}": functools.partial(forward, ids[length]) for length in LENGTHS}


def measure(config: GemmaConfig, repetitions: int, torch_threads: int) -> dict:
    """The network beside its matrix products, then, its weights freed, PyTorch's beside the same products."""
    params = random_like(jax.eval_shape(lambda: init_params(Gemma(config), jax.random.key(0))))
    functions, compilation = {}, {}
    for length in LENGTHS:
        functions[f"encoder_{length}"] = encoder_function(config, params, length)
        functions[f"scan_{length}"], compilation[f"scan_{length}"] = network_function(config, params, length)
        functions[f"encoder_{length}_products"] = products_function(config, params, length)
    timings = time_interleaved(functions, repetitions, jax.block_until_ready)
    products = {
        f"torch_{length}_products": function
        for length, function in zip(LENGTHS, list(functions.values())[2::3], strict=True)
    }
    del params, functions
    gc.collect()
    jax.clear_caches()
    timings |= time_interleaved(torch_functions(config, torch_threads) | products, repetitions, jax.block_until_ready)
    ratios = {}
    for length in LENGTHS:
        ours, alone = timings[f"encoder_{length}"], timings[f"encoder_{length}_products"]
        ratios[f"{length} tokens, encoder / products"] = paired_ratio(ours, alone)
        ratios[f"{length} tokens, scan / products"] = paired_ratio(timings[f"scan_{length}"], alone)
        ratios[f"{length} tokens, encoder / torch"] = ratio(ours, timings[f"torch_{length}"])
        ratios[f"{length} tokens, machine beside encoder / machine beside torch"] = ratio(
            alone, timings[f"torch_{length}_products"]
        )
    return {"timings": timings, "compilation": compilation, "ratios": ratios}


def markdown(report: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{report['device']}; {versions}; load average {report['load_average']:.1f} at the start",
        "",
        f"| float32, batch 1, {report['layers']} layers of full width | median | p10 | p90 | minimum | n | compile | "
        "temporary memory |",
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
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gemma_cpu", description=__doc__)
    parser.add_argument("--full", action="store_true", help="all 26 layers and the whole table (11 GB, minutes)")
    parser.add_argument("--layers", type=int, default=3, help="layers of the small form")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--torch-threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures as well")
    options = parser.parse_args(arguments)
    keep_freed_memory("cpu")  # as the commands do; PyTorch has it too

    config = GemmaConfig() if options.full else GemmaConfig(num_hidden_layers=options.layers, vocab_size=1000)
    report = environment() | {"layers": config.num_hidden_layers}
    report["versions"]["transformers"] = importlib.metadata.version("transformers")
    report |= measure(config, options.repetitions, options.torch_threads)
    report["timings"] = {name: timing.summary() for name, timing in report["timings"].items()}
    report["peak_resident_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(markdown(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
