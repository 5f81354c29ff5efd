"""Seconds and peak host memory of import, inspect and export, on full-size random checkpoints made here.

``python -m tests.benchmarks.conversion --model 600m 1600m --dtype bfloat16 float32 --folder /somewhere/big``
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parents[2]
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}


def write_random_component(directory: Path, config: dict, dtype: str) -> int:
    """A published transformer's directory with random weights, without PyTorch; returns the bytes of its weights."""
    from convert.families import network_of
    from sana_jax.weights.rules import places
    from sana_jax.weights.safetensors_files import TensorInfo, write_safetensors

    network = network_of(config, "config")
    kind = _DTYPES[dtype]
    infos = {
        name: TensorInfo(kind, place.shape) for name, place in sorted(places(network.rules, network.abstract).items())
    }
    generator = np.random.default_rng(0)
    pool = generator.standard_normal(1 << 20, np.float32).astype(kind)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, info in infos.items():
            # each from another place of one pool of numbers: unlike each other, and made as fast as they are written
            start = int(generator.integers(len(pool)))
            yield name, np.resize(np.roll(pool, start), info.shape)

    directory.mkdir(parents=True)
    file = directory / "diffusion_pytorch_model.safetensors"
    write_safetensors(file, infos, tensors())
    (directory / "config.json").write_text(json.dumps(config))
    return file.stat().st_size


def measure(arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of one command, in a process of its own."""
    # A child's peak begins with its parent's, so a small process of its own starts the command.
    code = (
        "import subprocess, resource, sys, time\n"
        "begin = time.perf_counter()\n"
        "status = subprocess.run([sys.executable, '-m', 'convert.main', *sys.argv[1:]], stdout=sys.stderr).returncode\n"
        "print(status, time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    status, seconds, peak = done.stdout.split()
    if status != "0":
        raise RuntimeError(f"convert.main {' '.join(arguments)} failed:\n{done.stderr}")
    return float(seconds), int(peak)


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two published components hold the same tensors, bit for bit."""
    from sana_jax.weights.safetensors_files import SafetensorsSource, find_weights_file

    one, two = (SafetensorsSource(find_weights_file(path, "diffusion_pytorch_model")) for path in (first, second))
    return one.tensors == two.tensors and all(
        one.read(name).tobytes() == two.read(name).tobytes() for name in one.tensors
    )


def run(model: str, dtype: str, folder: Path) -> None:
    """Prints one row per command."""
    from sana_jax.models.sana import SanaConfig

    config = getattr(SanaConfig, f"sana_{model}")().to_dict()
    base = folder / f"conversion-{model}-{dtype}"
    shutil.rmtree(base, ignore_errors=True)
    try:
        size = write_random_component(base / "published", config, dtype)
        published, converted, exported = (str(base / name) for name in ("published", "converted", "exported"))
        for arguments in (
            ["inspect", published],
            ["import", published, converted],
            ["inspect", converted],
            ["export", converted, exported],
        ):
            seconds, peak = measure(arguments)
            print(
                f"{model:>6} {dtype:>8} {size / 1e9:5.2f} GB  {arguments[0]:<8} {Path(arguments[1]).name:<10} "
                f"{seconds:6.1f} s  {size / seconds / 1e9:5.2f} GB/s  peak {peak / 1e9:5.2f} GB = {peak / size:4.2f} x",
                flush=True,
            )
        equal = same_tensors(Path(published), Path(exported))
        print(f"{model:>6} {dtype:>8} bitwise equal after import and export: {equal}", flush=True)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["600m"], choices=["600m", "1600m"])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=list(_DTYPES))
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="needs three times the checkpoint's size")
    options = parser.parse_args()
    for model in options.model:
        for dtype in options.dtype:
            run(model, dtype, options.folder)


if __name__ == "__main__":
    main()
