"""How long SANA-WM's recurrence takes on a CPU, beside its own matrix products and beside diffusers' module.

``python -m tests.benchmarks.gated_delta_rule_cpu`` times the main branch's bidirectional gated delta rule, rotation and
scale of the keys included on every side, on 21 latent frames of 15 x 26 tokens and 8 heads of 112; float32, batch 1.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import resource
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels.benchmarking.timing import Timing, paired_ratio, time_interleaved
from kernels.gated_delta_rule import gated_delta_rule
from sana_jax.host_memory import keep_freed_memory
from sana_jax.nn.rope import rope_3d
from tests.benchmarks.sana_cpu import compile_timed, environment, markdown

GRID, HEADS, SIZE = (21, 15, 26), 8, 112
FORMS = ("xla", "xla_associative")  # those that run on a CPU


def draw() -> tuple[np.ndarray, ...]:
    """``(query, key, value, beta, decay)`` as the rule takes them: queries and keys after their norm and ReLU."""
    rng = np.random.default_rng(0)
    tokens = (1, GRID[0], GRID[1] * GRID[2], HEADS)
    query, key, value = (rng.standard_normal((*tokens, SIZE), np.float32) for _ in range(3))
    beta, decay = rng.uniform(0.1, 0.9, tokens), rng.uniform(0.8, 1, (1, GRID[0], HEADS))
    return np.maximum(query, 0), np.maximum(key, 0), value, beta.astype(np.float32), decay.astype(np.float32)


def rule_function(implementation: str, arrays, gradient: bool = False) -> tuple[Callable[[], jax.Array], dict]:
    """The rule compiled for the given arrays, and its compilation."""
    scale = (SIZE * GRID[1] * GRID[2]) ** -0.5

    def run(arrays, rotation):
        return gated_delta_rule(*arrays, rotation, key_scale=scale, implementation=implementation)[0]

    def differentiate(arrays, rotation):
        return jax.grad(lambda arrays: (run(arrays, rotation) ** 2).sum())(arrays)

    arguments = tuple(map(jnp.asarray, arrays)), rope_3d(GRID, SIZE)
    compiled, compilation = compile_timed(differentiate if gradient else run, *arguments)
    return functools.partial(compiled, *arguments), compilation


def products_function(arrays) -> Callable[[], list[jax.Array]]:
    """The products over tokens alone, on operands that already lie head by head."""
    query, key, value = (jnp.asarray(np.swapaxes(x[0], 1, 2)) for x in arrays[:3])
    memory = jnp.asarray(np.random.default_rng(1).standard_normal((*query.shape[:2], SIZE, SIZE), np.float32))

    @jax.jit
    def run(query, key, value, memory):
        def tokens(one, other):
            return jnp.einsum("thsd,thse->thde", one, other)

        return tokens(key, key), tokens(key, value), tokens(query, query), jnp.einsum("thsd,thde->thse", query, memory)

    return functools.partial(run, query, key, value, memory)


def torch_function(arrays, threads: int, gradient: bool = False) -> Callable[[], object]:
    """diffusers' module on the same inputs."""
    import torch
    from diffusers.models.transformers.transformer_sana_wm import SanaWMBidirectionalGDNAttention, SanaWMRotaryPosEmbed

    torch.set_num_threads(threads)
    query, key, value, beta, decay = (torch.from_numpy(x.copy()) for x in arrays)
    tokens = [x.flatten(1, 2).requires_grad_(gradient) for x in (query, key, value)]
    gates = [x.contiguous().requires_grad_(gradient) for x in (beta.permute(0, 3, 1, 2), decay.permute(0, 2, 1))]
    rotation = SanaWMRotaryPosEmbed(SIZE, (1, 1, 1), 1024)(GRID)
    module = SanaWMBidirectionalGDNAttention(eps=1e-8)

    def run():
        with torch.set_grad_enabled(gradient):
            out = module(*tokens, *gates, torch.zeros(1), GRID[0], rotation)
        return torch.autograd.grad((out**2).sum(), [*tokens, *gates]) if gradient else out

    return run


def measure(repetitions: int = 7, torch_threads: int = 2, gradient: bool = False) -> dict:
    """Both forms beside diffusers' module and the products, interleaved."""
    arrays = draw()
    functions, compilation = {"torch": torch_function(arrays, torch_threads, gradient)}, {}
    for name in FORMS:
        functions[name], compilation[name] = rule_function(name, arrays, gradient)
    if not gradient:
        functions["products"] = products_function(arrays)
        expected = functions["torch"]().numpy()
        for name in FORMS:
            found = np.asarray(functions[name]()).reshape(expected.shape)
            difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            assert difference < 2e-6, f"{name} differs from torch by {difference:.1e}"
    timings = time_interleaved(functions, repetitions, jax.block_until_ready)
    ratios = {f"torch / {name}": paired_ratio(timings["torch"], timings[name]) for name in FORMS}
    if not gradient:
        ratios |= {f"{name} / products": paired_ratio(timings[name], timings["products"]) for name in FORMS}
    return {"timings": timings, "compilation": compilation, "ratios": ratios}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gated_delta_rule_cpu", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7, help="rounds")
    parser.add_argument("--gradient", action="store_true", help="time the gradient by all inputs instead of the values")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--torch-threads", type=int, default=cores, help="threads of PyTorch; all cores unless given")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures as well")
    options = parser.parse_args(arguments)
    keep_freed_memory("cpu")  # as the commands do; PyTorch has it too
    report = {**environment(), **measure(options.repetitions, options.torch_threads, options.gradient)}
    timings: dict[str, Timing] = report["timings"]
    report["timings"] = {name: timing.summary() for name, timing in timings.items()}
    report["peak_resident_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    what = "gradient" if options.gradient else "values"
    print(markdown(report, f"{what}, float32, batch 1, 21 x 15 x 26 tokens, 8 heads of 112"))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
