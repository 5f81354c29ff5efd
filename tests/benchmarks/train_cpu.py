"""How long a training step takes on a CPU, beside its own matrix products and beside the same step in PyTorch.

``python -m tests.benchmarks.train_cpu`` times a tiny, a medium and a wide network: forward, backward, gradient norm,
clipping and AdamW, in float32, without remat and without averaged weights, on the same batch and with as many threads.
PyTorch runs diffusers' network and its own AdamW (fused). The products are those of the forward and of the backward
pass alone: for each product of two arrays also the two that their gradients are.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import resource
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.benchmarking.timing import paired_ratio, ratio, time_interleaved
from sana_jax.host_memory import keep_freed_memory
from tests.benchmarks.sana_cpu import array, environment, markdown, random_like
from train.benchmark import CASES, CLIP_NORM, LEARNING_RATE, Case, random_batch, step_function

TIMED = ("tiny", "medium", "wide")


# -- its matrix products -----------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """A product of two arrays in the forward pass."""

    formula: str
    left: tuple[int, ...]
    right: tuple[int, ...]


def block_products(case: Case) -> list[Product]:
    """Of one block: against weights, and inside both attentions."""
    config, rows, captions = case.config, case.batch_size * case.tokens, case.batch_size * case.caption_tokens
    width, hidden = config.inner_dim, config.mlp_hidden
    heads, size = case.batch_size * config.num_attention_heads, config.attention_head_dim
    cross, cross_size = case.batch_size * config.num_cross_attention_heads, config.cross_attention_head_dim
    tokens, length = case.tokens, case.caption_tokens
    return [
        *[Product("ni,io->no", (rows, width), (width, width))] * 6,
        *[Product("ni,io->no", (captions, width), (width, width))] * 2,
        Product("ni,io->no", (rows, width), (width, 2 * hidden)),
        Product("ni,io->no", (rows, hidden), (hidden, width)),
        Product("hnd,hne->hde", (heads, tokens, size), (heads, tokens, size)),
        Product("hnd,hde->hne", (heads, tokens, size), (heads, size, size)),
        Product("hnd,hld->hnl", (cross, tokens, cross_size), (cross, length, cross_size)),
        Product("hnl,hld->hnd", (cross, tokens, length), (cross, length, cross_size)),
    ]


def outer_products(case: Case) -> list[Product]:
    """Of what is around the blocks."""
    config, rows, captions = case.config, case.batch_size * case.tokens, case.batch_size * case.caption_tokens
    width, pixels = config.inner_dim, config.patch_size**2
    shapes = [
        (rows, config.in_channels * pixels, width),
        (captions, config.caption_channels, width),
        (captions, width, width),
        (case.batch_size, 256, width),
        (case.batch_size, width, width),
        (case.batch_size, width, 6 * width),
        (rows, width, config.out_channels * pixels),
    ]
    return [Product("ni,io->no", (count, inner), (inner, out)) for count, inner, out in shapes]


def products_function(case: Case) -> Callable[[], Any]:
    """The products alone: each with the two of its gradients, every layer with arrays of its own."""

    def with_gradients(products: list[Product]) -> Callable:
        def run(pairs):
            results = []
            for product, (left, right, cotangent) in zip(products, pairs):
                out, pull_back = jax.vjp(functools.partial(jnp.einsum, product.formula), left, right)
                results.append((out, *pull_back(cotangent)))
            return results

        return jax.jit(run)

    def operands(products: list[Product]) -> list:
        shapes = []
        for product in products:
            out = jax.eval_shape(
                functools.partial(jnp.einsum, product.formula), array(*product.left), array(*product.right)
            )
            shapes.append((array(*product.left), array(*product.right), out))
        return random_like(shapes)

    block, outer = block_products(case), outer_products(case)
    run_block, run_outer = with_gradients(block), with_gradients(outer)
    layers, around = [operands(block) for _ in range(case.config.num_layers)], operands(outer)

    def run():
        for _ in range(case.steps):
            results = run_outer(around)
            for layer in layers:
                results = jax.block_until_ready(run_block(layer))  # the results of one layer at a time are alive
        return results

    return run


# -- PyTorch -----------------------------------------------------------------------------------------------------------


def torch_function(case: Case) -> Callable[[], Any]:
    """The same step with diffusers' network."""
    import torch
    from diffusers import SanaTransformer2DModel

    fields = case.config.to_dict()
    del fields["_class_name"]
    model = SanaTransformer2DModel(**fields).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    batch = random_batch(case)
    latents = torch.from_numpy(batch.latents).permute(0, 3, 1, 2).contiguous()
    embeds, mask = torch.from_numpy(batch.prompt_embeds), torch.from_numpy(np.array(batch.prompt_attention_mask))

    def run():
        for _ in range(case.steps):
            noise = torch.randn(latents.shape, generator=generator)
            uniform = torch.randn(case.batch_size, generator=generator).sigmoid()
            sigma = 3.0 * uniform / (1 + 2.0 * uniform)
            cut = sigma[:, None, None, None]
            noisy = (1 - cut) * latents + cut * noise
            (found,) = model(noisy, embeds, sigma * 1000, encoder_attention_mask=mask, return_dict=False)
            loss = (found - (noise - latents)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


# -- the report --------------------------------------------------------------------------------------------------------


def measure(name: str, case: Case, repetitions: int) -> dict[str, dict]:
    """A case: what each side takes, in turn, and the ratios."""
    step, compilation = step_function(case)
    functions = {f"{name}": step, f"{name}_products": products_function(case), f"{name}_torch": torch_function(case)}
    timings = time_interleaved(functions, repetitions, jax.block_until_ready)
    ours, products, torch = (timings[key] for key in functions)
    return {
        "timings": timings,
        "compilation": {name: compilation},
        "ratios": {
            f"{name}: step / PyTorch's": paired_ratio(ours, torch),
            f"{name}: step / PyTorch's, least disturbed": ratio(ours, torch),
            f"{name}: step / its products": paired_ratio(ours, products),
            f"{name}: step / its products, least disturbed": ratio(ours, products),
        },
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.train_cpu", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--case", choices=TIMED, action="append", help="which networks; all without it")
    parser.add_argument("--batch-size", type=int, help="pictures of a step, in place of each network's own number")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures as well")
    options = parser.parse_args(arguments)

    keep_freed_memory("cpu")  # as train.main does; PyTorch has it too
    import torch

    torch.set_num_threads(options.threads)
    report = environment()
    cases = {name: CASES[name] for name in options.case or TIMED}
    if options.batch_size:
        cases = {name: dataclasses.replace(case, batch_size=options.batch_size) for name, case in cases.items()}
    parts = [measure(name, case, options.repetitions) for name, case in cases.items()]
    for key in ("timings", "compilation", "ratios"):
        report[key] = {name: value for part in parts for name, value in part[key].items()}
    report["timings"] = {name: timing.summary() for name, timing in report["timings"].items()}
    report["peak_resident_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    what = ", ".join(f"{name}: {case.steps} steps of {case.batch_size}" for name, case in cases.items())
    print(markdown(report, f"float32; {what}"))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
