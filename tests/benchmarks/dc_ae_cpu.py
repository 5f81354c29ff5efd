"""How long DC-AE takes on a CPU at full size, beside its own matrix products and dense convolutions, and PyTorch.

``python -m tests.benchmarks.dc_ae_cpu`` decodes and encodes one picture of 512 px in float32 with the autoencoder of
SANA (f32c32); weights are random. The products are read off the traced network: every one of them is run alone, as
often as the network has it.
"""

from __future__ import annotations

import argparse
import collections
import functools
import gc
import json
import math
import pathlib
import resource
from collections.abc import Callable

import jax
from jax.extend import core as jax_core

from kernels.benchmarking.timing import paired_ratio, ratio, time_interleaved
from sana_jax.autoencoders.dc_ae import DCDecoder, DCEncoder, init_params
from sana_jax.autoencoders.dc_ae_config import DCAEConfig
from sana_jax.host_memory import keep_freed_memory
from tests.benchmarks.sana_cpu import array, compile_timed, environment, markdown, random_like

CONFIG = DCAEConfig.f32c32_sana()
NETWORKS = {"encode": ("encoder", DCEncoder), "decode": ("decoder", DCDecoder)}


def network_input(name: str, pixels: int) -> jax.ShapeDtypeStruct:
    if name == "encode":
        return array(1, pixels, pixels, CONFIG.in_channels)
    side = pixels // CONFIG.spatial_factor
    return array(1, side, side, CONFIG.latent_channels)


def network_function(name: str, pixels: int) -> tuple[Callable[[], jax.Array], dict]:
    """The compiled network with its arguments, and its compilation."""
    half, network = NETWORKS[name]
    abstract = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))[half]
    arguments = random_like(abstract), random_like(network_input(name, pixels), 1.0)
    compiled, compilation = compile_timed(lambda params, x: network(CONFIG).apply({"params": params}, x), *arguments)
    return functools.partial(compiled, *arguments), compilation


def products(name: str, pixels: int) -> dict[tuple, tuple[jax_core.JaxprEqn, int]]:
    """The network's matrix products and dense convolutions: what each is, and how often it occurs."""
    half, network = NETWORKS[name]
    abstract = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))[half]
    traced = jax.make_jaxpr(lambda params, x: network(CONFIG).apply({"params": params}, x))(
        abstract, network_input(name, pixels)
    )
    return products_of(traced)


def products_of(traced: jax_core.ClosedJaxpr) -> dict[tuple, tuple[jax_core.JaxprEqn, int]]:
    """The matrix products and dense convolutions of a traced function."""
    counts: collections.Counter = collections.Counter()
    examples = {}
    pending = [traced.jaxpr]
    while pending:
        for equation in pending.pop().eqns:
            pending += jax_core.jaxprs_in_params(equation.params)
            if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
                continue
            if equation.params.get("feature_group_count", 1) > 1:
                continue
            key = (equation.primitive.name, *(v.aval.shape for v in equation.invars), str(equation.params))
            counts[key] += 1
            examples[key] = equation
    return {key: (examples[key], count) for key, count in counts.items()}


def products_function(name: str, pixels: int) -> Callable[[], jax.Array]:
    """Runs the products of a network alone, one after another."""
    return run_products(products(name, pixels))


def run_products(found: dict[tuple, tuple[jax_core.JaxprEqn, int]]) -> Callable[[], jax.Array]:
    """A function that runs each as often as it was found."""
    runs = []
    for equation, count in found.values():
        operands = random_like([array(*v.aval.shape) for v in equation.invars], 1.0)
        run = jax.jit(functools.partial(equation.primitive.bind, **equation.params))
        runs.append((functools.partial(run, *operands), count))

    def run_all() -> jax.Array:
        for run, count in runs:
            for _ in range(count):
                out = jax.block_until_ready(run())
        return out

    return run_all


def torch_functions(pixels: int, threads: int) -> dict[str, Callable[[], object]]:
    """Diffusers' networks with weights of the same distribution."""
    import torch
    from diffusers import AutoencoderDC

    torch.set_num_threads(threads)
    fields = CONFIG.to_dict()
    del fields["_class_name"]
    with torch.device("meta"):
        model = AutoencoderDC(**fields)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)

    def run(half: str, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return getattr(model, half)(x)

    functions = {}
    for name, (half, _) in NETWORKS.items():
        _, height, width, channels = network_input(name, pixels).shape
        x = torch.randn(1, channels, height, width, generator=generator)
        functions[name] = functools.partial(run, half, x)
    return functions


def measure(pixels: int = 512, repetitions: int = 3, torch_threads: int = 2, names: tuple[str, ...] = ()) -> dict:
    """Each network, its products and PyTorch's in turn."""
    timings, compilation, ratios = {}, {}, {}
    theirs = torch_functions(pixels, torch_threads)
    for name in names or NETWORKS:
        ours, compilation[name] = network_function(name, pixels)
        functions = {name: ours, f"{name}_products": products_function(name, pixels), f"{name}_torch": theirs[name]}
        timings |= time_interleaved(functions, repetitions, jax.block_until_ready)
        ratios[f"{name} / products"] = paired_ratio(timings[name], timings[f"{name}_products"])
        ratios[f"{name} / torch"] = ratio(timings[name], timings[f"{name}_torch"])
        del ours, functions
        gc.collect()
    return {"timings": timings, "compilation": compilation, "ratios": ratios}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.dc_ae_cpu", description=__doc__)
    parser.add_argument("--pixels", type=int, default=512, help="height and width of the picture")
    parser.add_argument("--repetitions", type=int, default=3, help="rounds")
    parser.add_argument("--torch-threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--only", choices=NETWORKS, help="only this network")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures as well")
    options = parser.parse_args(arguments)
    keep_freed_memory("cpu")  # as the commands do; PyTorch has it too

    names = (options.only,) if options.only else ()
    report = environment() | measure(options.pixels, options.repetitions, options.torch_threads, names)
    report["timings"] = {name: timing.summary() for name, timing in report["timings"].items()}
    report["peak_resident_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    assert all(math.isfinite(value) for value in report["ratios"].values())
    print(markdown(report, f"DC-AE f32c32, {options.pixels} px, float32, batch 1"))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
