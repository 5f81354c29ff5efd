"""Who may import whom, read from the source of every module; and what the library needs to import at all."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# package -> packages of ours that it may import
MAY_IMPORT = {
    "kernels": {"kernels"},
    "sana_jax": {"sana_jax", "kernels"},
    "configs": {"configs", "sana_jax", "kernels"},
    "train": {"train", "configs", "sana_jax", "kernels"},
    "convert": {"convert", "sana_jax", "kernels"},
}
OURS = {*MAY_IMPORT, "tests"}
# libraries -> the only packages that may name them
CONFINED = {"torch": {"convert"}, "diffusers": {"convert"}, "tensorflow": set()}
# What a machine has on which the library only runs; and what flax brings along and needs itself.
PRESENT = ("jax", "jaxlib", "numpy", "flax", "einops", "safetensors")


def imported(source: str, package: str) -> list[tuple[int, str]]:
    """(line, whole module name) of every import anywhere in a module, relative ones resolved."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            found.append((node.lineno, ".".join(part for part in (base, node.module) if part)))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            found += [(node.lineno, name.value) for name in node.args[:1] if isinstance(name, ast.Constant)]
    return found


def breaches(root: Path) -> list[str]:
    """Every import that the house forbids, as ``file:line imports name``."""
    found = []
    for package, allowed in MAY_IMPORT.items():
        for path in sorted((root / package).rglob("*.py")):
            within = ".".join(path.relative_to(root).parent.parts)
            for line, name in imported(path.read_text(), within):
                top = name.split(".")[0]
                forbidden = top in OURS and top not in allowed
                confined = top in CONFINED and package not in CONFINED[top]
                if forbidden or confined:
                    found.append(f"{path.relative_to(root)}:{line} imports {name}")
    return found


def test_nobody_imports_backwards():
    assert breaches(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/op/api.py", "from sana_jax.errors import UserError"),
        ("kernels/op/api.py", "def f():\n    import sana_jax"),
        ("sana_jax/models/x.py", "from configs import PRESETS"),
        ("sana_jax/models/x.py", "import train.step as step"),
        ("sana_jax/x.py", "import importlib\nimportlib.import_module('train.main')"),
        ("sana_jax/x.py", "from ..train import step"),
        ("configs/x.py", "import train"),
        ("convert/x.py", "from train import checkpoints"),
        ("train/x.py", "from tests.train import tiny_run"),
        ("train/x.py", "import torch"),
        ("sana_jax/x.py", "if False:\n    from diffusers.models import x"),
        ("convert/x.py", "import tensorflow"),
    ],
)
def test_a_planted_breach_is_found(tmp_path, path, source):
    for package in MAY_IMPORT:
        (tmp_path / package).mkdir()
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    file.write_text(source)
    assert len(breaches(tmp_path)) == 1
    assert breaches(tmp_path)[0].startswith(path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("convert/x.py", "import torch"),
        ("train/x.py", "from sana_jax import nn"),
        ("sana_jax/x.py", "from . import nn"),
    ],
)
def test_what_is_allowed_is_not_a_breach(tmp_path, path, source):
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_text(source)
    assert breaches(tmp_path) == []


# Blocks every module of site-packages that is neither in PRESENT nor loaded by importing PRESENT itself, then imports
# the packages named on the command line, every module of them.
BARE_MACHINE = """
import importlib, importlib.metadata, pkgutil, sys
import jax, flax.linen, numpy, einops, safetensors.numpy
brought_along = {name.split(".")[0] for name in sys.modules}
third_party = set(importlib.metadata.packages_distributions())
ours = {"kernels", "sana_jax", "configs", "train", "convert", "tests"}
blocked = third_party - brought_along - ours - set(sys.argv[1].split(","))
for name in list(sys.modules):
    if name.split(".")[0] in {"orbax", "optax", "jaxtyping", "PIL", "tqdm", "tyro"}:
        blocked.add(name.split(".")[0])  # flax has its own reference to what it imported

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked and not called_by_flax():
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

def called_by_flax():
    frame = sys._getframe(2)
    while frame:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] in ours:
            return False
        if module.split(".")[0] not in ("importlib", "__main__") and "importlib" not in module:
            return True
        frame = frame.f_back
    return False

for name in [name for name in sys.modules if name.split(".")[0] in blocked]:
    del sys.modules[name]
sys.meta_path.insert(0, Refuse())
for package in sys.argv[2:]:
    module = importlib.import_module(package)
    print(package, "imported")
absent = ("PIL", "tqdm", "tyro", "jaxtyping", "orbax", "optax", "grain", "torch")
missing = [name for name in absent if name in sys.modules]
print("loaded:", missing)
import sana_jax.models.sana, sana_jax.diffusion.flow, sana_jax.diffusion.samplers, sana_jax.diffusion.timesteps
import sana_jax.pipelines.text_to_image, kernels.linear_attention, kernels.depthwise_conv
import sana_jax.text_encoders, sana_jax.autoencoders, sana_jax.weights, sana_jax.images
from sana_jax import SanaPipeline
print("loaded:", sorted(name for name in sys.modules if name in blocked))
"""


def test_kernels_and_library_import_on_a_bare_machine():
    done = subprocess.run(
        [sys.executable, "-c", BARE_MACHINE, ",".join(PRESENT), "kernels", "sana_jax"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["kernels imported", "sana_jax imported", "loaded: []", "loaded: []"], (
        done.stdout
    )
