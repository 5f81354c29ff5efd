"""Compiled programs on disk, and what a damaged or foreign file does."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.selection import preferring
from sana_jax import compilation, executables
from sana_jax.compilation import Programs, compile_ahead
from sana_jax.diffusion.samplers import DPMSolver
from sana_jax.executables import ExecutableStore, Unknown, describe
from sana_jax.models.sana import SanaTransformer
from sana_jax.pipelines.sampling_function import Network
from tests.pipelines.tiny_model import tiny_config

X = jnp.arange(12.0).reshape(3, 4)


@pytest.fixture
def store(tmp_path, monkeypatch) -> ExecutableStore:
    found = ExecutableStore(tmp_path / "executables")
    monkeypatch.setattr(executables._process, "store", found)
    monkeypatch.setattr(compilation, "SHORTEST_COMPILING", 0.0)
    return found


class Traced:
    """A function that counts how often it is traced."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor, self.count = factor, 0

    def __call__(self, tree):
        self.count += 1
        return {"y": jnp.tanh(tree["x"] * self.factor) @ tree["x"].T, "n": tree["n"] + 1}


def compiled(function, x=X, identity="f", lines=None):
    argument = {"x": x, "n": jnp.int32(3)}
    say = (lambda line: None) if lines is None else lines.append
    program = compile_ahead("a program", jax.jit(function), argument, say=say, identity=identity)
    return program(argument)


def test_the_second_process_neither_traces_nor_compiles(store):
    """One process stands for two: nothing but the disk is shared between the two functions."""
    first, second, lines = Traced(), Traced(), []
    made = compiled(first, lines=lines)
    assert re.match(r"kept the compiled program on disk .*; .*executables holds 1 of them, ", lines[-1])
    again = compiled(second, lines=lines)
    assert (first.count, second.count) == (1, 0)
    assert lines[-1].startswith("read the compiled program of a program from disk, ")
    jax.tree.map(np.testing.assert_array_equal, again, made)
    assert store.total()[0] == 1
    assert oct(store.directory.stat().st_mode)[-3:] == "700"


def test_what_changes_the_program_changes_the_key(store, monkeypatch):
    """Shapes, dtypes, what the caller says, settings, flags, versions and the source: each is another program."""

    def key(x=X, shift=3.0):
        return store.key(("f", DPMSolver(shift)), ({"x": x},)).name

    keys = {key(), key(X[:2]), key(X.astype(jnp.bfloat16)), key(shift=4.0)}
    with jax.default_matmul_precision("highest"):
        keys.add(key())
    with monkeypatch.context() as patched:
        patched.setenv("XLA_FLAGS", "--something")
        keys.add(key())
    with monkeypatch.context() as patched:
        patched.setattr(executables, "source_hash", lambda: "other")
        keys.add(key())
    with monkeypatch.context() as patched:
        patched.setattr(executables.importlib.metadata, "version", lambda name: "0.0")
        keys.add(key())
    with jax.set_mesh(jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("encoders",))):
        keys.add(key())
    with preferring("xla"):
        keys.add(key())
    assert len(keys) == 10
    assert key() in keys


def test_programs_of_several_devices_are_not_kept(store):
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",))):
        assert store.key("f", ({"x": X},)) is None


def test_a_change_of_the_source_that_changes_no_program_repeats_tracing_alone(store, monkeypatch):
    compiled(Traced())
    monkeypatch.setattr(executables, "source_hash", lambda: "another version")
    function, lines = Traced(), []
    compiled(function, lines=lines)
    assert function.count == 1
    assert lines[-1].startswith("read the compiled program")
    assert compiled(Traced(), lines=lines) is not None
    other, lines = Traced(3.0), []
    monkeypatch.setattr(executables, "source_hash", lambda: "a third version")
    compiled(other, lines=lines)
    assert lines[-2].startswith("compiled a program")
    assert store.total()[0] == 2


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "foreign", "link", "empty", "writable by others", "not a program"]
)
def test_files_that_are_not_used(store, damage):
    """One line says so, and the program is compiled anew and kept."""
    made = compiled(Traced())
    (file,), (link,) = (list(store.directory.glob(f"*.{kind}")) for kind in ("executable", "link"))
    content = file.read_bytes()
    if damage == "link":
        link.write_text("../../etc/passwd")
    elif damage == "writable by others":
        file.chmod(0o666)
    elif damage == "not a program":
        body = b"cos\nsystem\n(S'exit 1'\ntR."
        import hashlib
        import json

        header = {"bytes": len(body), "sha256": hashlib.sha256(body[:-1]).hexdigest()}
        file.write_bytes(executables._MAGIC + json.dumps(header).encode() + b"\n" + body)
    else:
        changed = {
            "cut": content[:-100],
            "flipped": content[:-50] + bytes([content[-50] ^ 1]) + content[-49:],
            "foreign": b"\x80\x04nothing of ours",
            "empty": b"",
        }
        file.write_bytes(changed[damage])
    function, lines = Traced(), []
    jax.tree.map(np.testing.assert_array_equal, compiled(function, lines=lines), made)
    assert function.count == 1
    ignored = [line for line in lines if "it is ignored, and a program is compiled anew" in line]
    assert ignored
    wanted = {"writable by others": "can be written by others"}.get(damage, "is damaged")
    assert wanted in ignored[0]
    assert "\n" not in ignored[0]
    again = Traced()
    compiled(again)
    assert again.count == 0


def test_a_directory_that_cannot_be_written(store, capsys):
    store.directory.parent.mkdir(exist_ok=True)
    store.directory.write_text("a file is in the way")
    lines = []
    compiled(Traced(), lines=lines)
    assert lines[-1].startswith("a program is not kept on disk: ")


def test_the_oldest_go_when_there_is_no_room(store, monkeypatch):
    compiled(Traced(), identity="f")
    (oldest,) = store.directory.glob("*.executable")
    os.utime(oldest, (1, 1))
    monkeypatch.setattr(executables, "LARGEST_TOTAL", int(1.5 * oldest.stat().st_size))
    compiled(Traced(3.0), identity="g")
    assert not oldest.exists()
    assert store.total()[0] == 1
    assert len(list(store.directory.glob("*.link"))) == 1  # the other led nowhere
    function = Traced()
    compiled(function, identity="f")
    assert function.count == 1


@dataclasses.dataclass(frozen=True)
class Named:
    """Settings with a name that means something."""

    name: str


def test_descriptions():
    network = Network(SanaTransformer(tiny_config(), dtype=jnp.bfloat16))
    assert describe(network) == describe(Network(SanaTransformer(tiny_config(), dtype=jnp.bfloat16)))
    others = [
        Network(SanaTransformer(tiny_config(), dtype=jnp.float32)),
        Network(SanaTransformer(tiny_config(num_layers=3), dtype=jnp.bfloat16)),
        Network(SanaTransformer(tiny_config(), dtype=jnp.bfloat16, remat="full")),
    ]
    assert all(describe(other) != describe(network) for other in others)
    assert describe(np.arange(3)) != describe(np.arange(4))
    assert describe(SanaTransformer(tiny_config(), name="a")) == describe(SanaTransformer(tiny_config(), name="b"))
    assert describe(Named("a")) != describe(Named("b"))
    assert " at 0x" not in str(describe((network, DPMSolver(), {"a": 1.5, "b": None}, jnp.dtype("bfloat16"))))
    with pytest.raises(Unknown, match="has no description"):
        describe(lambda: None)


def test_what_cannot_be_described_is_said_and_not_kept(store):
    lines = []
    compiled(Traced(), identity=object(), lines=lines)
    assert lines[0].startswith("a program is not kept on disk: builtins.object has no description")
    assert not store.directory.exists()


def test_programs_hand_on_what_they_depend_on(store):
    def run(x):
        return x + 1

    for what, identity, kept in (("a", None, 0), ("a", "f", 1), ("b", "f", 1), ("b", "g", 1)):
        programs = Programs()
        program = programs.get("one", what, run, X, identity=identity)
        assert program.seconds > 0
        assert store.total()[0] == kept
        assert program.device_bytes > program.working_bytes >= X.nbytes
        np.testing.assert_array_equal(program.run(X), X + 1)
    donated = Programs().get("one", "a", run, X, donate=(0,), identity="f")
    assert donated.working_bytes < X.nbytes
    assert store.total()[0] == 2
    again = Programs().get("one", "a", run, X, donate=(0,), identity="f")
    given = jnp.array(X)
    again.run(given)
    assert given.is_deleted()


@pytest.mark.parametrize("value", [None, "0", "off", "elsewhere"])
def test_the_environment_says_where(tmp_path, monkeypatch, value):
    monkeypatch.setattr(executables._process, "store", None)
    monkeypatch.delenv(executables.ENVIRONMENT, raising=False)
    if value is not None:
        monkeypatch.setenv(executables.ENVIRONMENT, str(tmp_path / value) if value == "elsewhere" else value)
    where = executables.enable_executables(tmp_path / "cache")
    expected = {None: str(tmp_path / "cache" / "executables"), "elsewhere": str(tmp_path / "elsewhere")}
    assert where == expected.get(value, "off")
    assert (executables.executable_store() is None) == (where == "off")


def test_another_process_reads_it(run, tmp_path):
    """A pipeline's steps, kept by one process and used by another: the same picture, nothing traced or compiled."""
    environment = {
        **os.environ,
        "SANA_JAX_EXECUTABLES": str(tmp_path / "kept"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
    }
    code = (
        "import sys; from sana_jax import SanaPipeline, compilation; compilation.SHORTEST_COMPILING = 0\n"
        "compilation.enable_compilation_cache()\n"
        "import numpy as np; pipe = SanaPipeline.from_pretrained(sys.argv[1])\n"
        "np.save(sys.argv[2], pipe('a seven', output_type='latent').images)"
    )
    said = []
    for name in ("first.npy", "second.npy"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(run.directory), str(tmp_path / name)],
            cwd=pathlib.Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "compiled the transformer" in said[0]
    assert "kept the compiled program on disk" in said[0]
    assert "compil" not in said[1].replace("read the compiled program", "")
    np.testing.assert_array_equal(np.load(tmp_path / "first.npy"), np.load(tmp_path / "second.npy"))
