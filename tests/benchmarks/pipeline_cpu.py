"""Text to picture with SANA 0.6B at 512 px on a CPU: seconds of each stage, beside diffusers, and of starting.

``python -m tests.benchmarks.pipeline_cpu`` runs both sides in turn, each in a process of its own (Gemma-2 alone takes
10.5 GB in float32, and both do not fit in 24 GB), with random weights of the full sizes: one prompt, two denoising
steps with guidance, one picture. Each side draws twice and the second time counts. Then ours starts again, with the
compilation cache that the first start has filled.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

STARTED = time.perf_counter()
PIXELS, STEPS, GUIDANCE = 512, 2, 4.5
PROMPTS = ("a red panda reading a book under a tree", "two small birds sitting on a wire at dusk")


def run_ours(directory: pathlib.Path) -> dict:
    """Seconds of our stages, of the first step and of compiling."""
    import jax
    import jax.numpy as jnp

    from kernels.benchmarking.timing import random_like
    from sana_jax.autoencoders.dc_ae import init_params as autoencoder_params
    from sana_jax.autoencoders.dc_ae_config import DCAEConfig
    from sana_jax.autoencoders.dc_autoencoder import DCAutoencoder
    from sana_jax.compilation import enable_compilation_cache
    from sana_jax.diffusion.samplers import DPMSolver
    from sana_jax.host_memory import keep_freed_memory
    from sana_jax.models.gemma import Gemma, GemmaConfig
    from sana_jax.models.gemma import init_params as gemma_params
    from sana_jax.models.sana import SanaConfig, SanaTransformer
    from sana_jax.pipelines.model_directory import SamplingDefaults
    from sana_jax.pipelines.opening import abstract_params
    from sana_jax.pipelines.text_to_image import SanaPipeline
    from sana_jax.text_encoders.gemma import GemmaTextEncoder
    from sana_jax.text_encoders.tokenizer import PromptTokenizer
    from sana_jax.weights.components import Resident

    keep_freed_memory("cpu")  # as generate does
    enable_compilation_cache()
    imported = time.perf_counter()
    transformer, gemma, autoencoder = SanaTransformer(SanaConfig.sana_600m(sample_size=16)), GemmaConfig(), DCAEConfig
    config = autoencoder.f32c32_sana()
    text_params = random_like(jax.eval_shape(lambda: gemma_params(Gemma(gemma), jax.random.key(0))))
    pipe = SanaPipeline(
        transformer,
        random_like(abstract_params(transformer)),
        DPMSolver(3.0),
        GemmaTextEncoder(
            gemma, PromptTokenizer.from_directory(directory), Resident.of("text", text_params), dtype=jnp.float32
        ),
        DCAutoencoder.from_params(
            config, random_like(jax.eval_shape(lambda: autoencoder_params(config, jax.random.key(0))))
        ),
        SamplingDefaults(GUIDANCE, STEPS, PIXELS, PIXELS),
        residency="all",
    )
    jax.block_until_ready(pipe.params)
    ready = time.perf_counter()
    steps: list[float] = []

    def note(_pipeline, _index, _timestep, values):
        jax.block_until_ready(values["latents"])
        steps.append(time.perf_counter())

    pipe(PROMPTS[0], binning="off", output_type="np", callback_on_step_end=note)
    first_call = time.perf_counter() - ready
    pipe._encodings.clear()
    out = pipe(PROMPTS[1], binning="off", output_type="np")
    return {
        "import_s": imported - STARTED,
        "first_step_s": imported - STARTED + steps[0] - ready,
        "first_call_s": first_call,
        "stages": dict(out.seconds),
        "peak_resident_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def run_diffusers(directory: pathlib.Path, threads: int) -> dict:
    """Seconds of diffusers' stages, from the times at which its components are called."""
    from sana_jax.benchmarking.models import image_model
    from tests.benchmarks.torch_side import prepare

    model = image_model("sana_600m", "full")
    run = prepare({
        "kind": "image_pipeline",
        "transformer": model.transformer.to_dict(),
        "text_encoder": model.text_encoder.to_dict(),
        "vae": model.autoencoder.to_dict(),
        "tokenizer": str(directory),
        "prompts": PROMPTS,
        "pixels": PIXELS,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "flow_shift": model.flow_shift,
        "dtype": "float32",
        "device": "cpu",
        "compile": False,
        "threads": threads,
    })  # fmt: skip
    for _ in PROMPTS:
        stages = run()
    return {"stages": stages, "peak_resident_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def run_side(side: str, directory: pathlib.Path, cache: pathlib.Path, threads: int) -> dict:
    """One side in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.pipeline_cpu", "--side", side, "--tokenizer", str(directory)]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [*command, "--torch-threads", str(threads)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(threads: int = 2) -> dict:
    """Both sides in turn, and our second start; each with the time of every stage."""
    from sana_jax.benchmarking.models import word_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer, cache = pathlib.Path(folder) / "tokenizer", pathlib.Path(folder) / "cache"
        word_tokenizer(tokenizer)
        report = {"ours": run_side("ours", tokenizer, cache, threads)}
        report["diffusers"] = run_side("diffusers", tokenizer, cache, threads)
        report["ours, second start"] = run_side("ours", tokenizer, cache, threads)
    for row in report.values():
        row["total_s"] = sum(row["stages"].values())
    return report


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pipeline_cpu", description=__doc__)
    parser.add_argument(
        "--side", choices=("ours", "diffusers"), help="one side in this process, for the program itself"
    )
    parser.add_argument("--tokenizer", type=pathlib.Path, help="the same")
    parser.add_argument("--torch-threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures as well")
    options = parser.parse_args(arguments)
    if options.side:
        side = (
            run_ours(options.tokenizer)
            if options.side == "ours"
            else run_diffusers(options.tokenizer, options.torch_threads)
        )
        print(json.dumps(side))
        return
    report = measure(options.torch_threads)
    print(f"SANA 0.6B, {PIXELS} px, {STEPS} steps with guidance, float32, CPU, random weights, second call")
    print("| side | text | denoise | decode | together | peak resident memory |\n|---|---|---|---|---|---|")
    for name, row in report.items():
        stages = " | ".join(f"{row['stages'][stage]:.2f} s" for stage in ("text", "denoise", "decode"))
        print(f"| {name} | {stages} | {row['total_s']:.2f} s | {row['peak_resident_MB'] / 1e3:.1f} GB |")
    for name in ("ours", "ours, second start"):
        row = report[name]
        print(
            f"{name}: imports {row['import_s']:.1f} s; start to the end of the first step, without making weights, "
            f"{row['first_step_s']:.1f} s; first call {row['first_call_s']:.1f} s"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
