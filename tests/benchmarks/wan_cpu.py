"""How long the Wan 2.1 autoencoder takes on a CPU at full size, beside its own products and convolutions, and PyTorch.

``python -m tests.benchmarks.wan_cpu`` encodes 5 frames of 128x208 pixels and decodes the 2 latent frames that they
become, in float32; weights are random. ``step`` is the decoding of a further latent frame with the state of the others.
The products are read off the traced network: every one of them is run alone, as often as the network has it. PyTorch
runs diffusers' own computation, one latent frame after another.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import pathlib
import resource
from collections.abc import Callable

import jax

from kernels.benchmarking.timing import paired_ratio, ratio, time_interleaved
from sana_jax.autoencoders.wan import WanDecoder, WanEncoder, init_params
from sana_jax.autoencoders.wan_config import WanConfig
from sana_jax.host_memory import keep_freed_memory
from tests.benchmarks.dc_ae_cpu import products_of, run_products
from tests.benchmarks.sana_cpu import array, compile_timed, environment, markdown, random_like

CONFIG = WanConfig()
CASES = ("encode", "decode", "step")


def case(name: str, frames: int, height: int, width: int) -> tuple[Callable, tuple]:
    """A network as a function of (params, x, state), and abstract arguments."""
    half, network = ("encoder", WanEncoder) if name == "encode" else ("decoder", WanDecoder)

    def run(params, x, state):
        out, after = network(CONFIG).apply({"params": params}, x, state)
        return (out, after) if name == "step" else out

    params = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))[half]
    if name == "encode":
        return run, (params, array(1, frames, height, width, CONFIG.in_channels), None)
    size = (height // CONFIG.spatial_factor, width // CONFIG.spatial_factor, CONFIG.z_dim)
    one = array(1, 1, *size)
    if name == "step":
        return run, (params, one, jax.eval_shape(run, params, one, None)[1])
    return run, (params, array(1, 1 + (frames - 1) // CONFIG.temporal_factor, *size), None)


def torch_functions(frames: int, height: int, width: int, threads: int) -> dict[str, Callable[[], object]]:
    """Diffusers' encoding and decoding with weights of the same distribution."""
    import torch
    from diffusers import AutoencoderKLWan

    torch.set_num_threads(threads)
    with torch.device("meta"):
        model = AutoencoderKLWan()
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)

    def run(function: Callable, x: torch.Tensor) -> object:
        with torch.inference_mode():
            return function(x, return_dict=False)

    functions = {}
    for name in ("encode", "decode"):
        _, length, *size, channels = case(name, frames, height, width)[1][1].shape
        x = torch.randn(1, channels, length, *size, generator=generator)
        functions[name] = functools.partial(run, getattr(model, name), x)
    return functions


def measure(
    size: tuple[int, int, int] = (5, 128, 208),
    repetitions: int = 3,
    torch_threads: int = 2,
    names: tuple[str, ...] = CASES,
) -> dict:
    """Each network, its products and PyTorch's in turn."""
    timings, compilation, ratios = {}, {}, {}
    theirs = torch_functions(*size, torch_threads) if torch_threads else {}
    for name in names:
        function, abstract = case(name, *size)
        arguments = [random_like(tree, deviation) for tree, deviation in zip(abstract, (0.02, 1.0, 1.0))]
        compiled, compilation[name] = compile_timed(function, *arguments)
        found = products_of(jax.make_jaxpr(function)(*abstract))
        functions = {name: functools.partial(compiled, *arguments), f"{name}_products": run_products(found)}
        if name in theirs:
            functions[f"{name}_torch"] = theirs[name]
        timings |= time_interleaved(functions, repetitions, jax.block_until_ready)
        ratios[f"{name} / products"] = paired_ratio(timings[name], timings[f"{name}_products"])
        if name in theirs:
            ratios[f"{name} / torch"] = ratio(timings[name], timings[f"{name}_torch"])
        del compiled, arguments, functions
        gc.collect()
    return {"timings": timings, "compilation": compilation, "ratios": ratios}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.wan_cpu", description=__doc__)
    parser.add_argument("--frames", type=int, default=5, help="of the video, 1 + 4k")
    parser.add_argument("--height", type=int, default=128, help="of the video")
    parser.add_argument("--width", type=int, default=208, help="of the video")
    parser.add_argument("--repetitions", type=int, default=3, help="rounds")
    parser.add_argument("--torch-threads", type=int, default=2, help="threads of PyTorch; 0 leaves it out")
    parser.add_argument("--only", choices=CASES, help="only this")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures as well")
    options = parser.parse_args(arguments)
    keep_freed_memory("cpu")  # as the commands do; PyTorch has it too

    names = (options.only,) if options.only else CASES
    size = (options.frames, options.height, options.width)
    before = os.getloadavg()[0]
    report = environment() | measure(size, options.repetitions, options.torch_threads, names)
    report["load_average"], report["load_average_after"] = before, os.getloadavg()[0]
    report["timings"] = {name: timing.summary() for name, timing in report["timings"].items()}
    report["peak_resident_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    assert all(math.isfinite(value) for value in report["ratios"].values())
    print(markdown(report, f"Wan 2.1 autoencoder, {'x'.join(map(str, size))}, float32, batch 1"))
    print(f"Load average {report['load_average_after']:.1f} at the end.")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
