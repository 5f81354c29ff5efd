"""Runs ``train.main`` with a tiny configuration: as a process, as a process with something going wrong, or in this one.

``python -m tests.train.run_training HOOK [ARGUMENT] -- OPTIONS`` is ``python -m train.main OPTIONS`` after one of the
hooks at the end of this file. All runs of a test session share one compilation cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tests.simulated_devices import simulated_devices

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY, PREVIEW_EVERY, ROW_EVERY = 24, 8, 12, 2
OPTIONS = {
    "transformer.num-layers": "2",
    "transformer.num-attention-heads": "2",
    "transformer.num-cross-attention-heads": "1",
    "transformer.cross-attention-dim": "32",
    "data.digits": "3 7",
    "batch-size": "8",
    "steps": f"{STEPS}",
    "optimizer.schedule": "constant",
    "optimizer.warmup-steps": "2",
    # With a smaller one the sign of a gradient that is nothing but rounding makes a whole update.
    "optimizer.epsilon": "1e-3",
    "logging.every": f"{ROW_EVERY}",
    "checkpoint.every": f"{SAVE_EVERY}",
    "checkpoint.keep-last": "9",
    "preview.every": f"{PREVIEW_EVERY}",
    "preview.num-inference-steps": "2",
    "preview.per-caption": "1",
}
# Columns that depend on nothing but the step; the others are over the steps since the last row, or the clock's.
EXACT_COLUMNS = ("step", "loss", "grad_norm", "update_norm", "param_norm", "learning_rate")


def tiny(run_dir: str | Path, **changes: str | int | float) -> list[str]:
    """The options of a tiny run; ``batch_size=4`` is ``--batch-size 4`` and ``data__digits`` is ``--data.digits``."""
    values = OPTIONS | {name.replace("__", ".").replace("_", "-"): str(value) for name, value in changes.items()}
    if values["preview.every"] == "0":
        values.pop("preview.per-caption")  # which nothing would read
    return ["--run-dir", str(run_dir), *(word for name, value in values.items() for word in _option(name, value))]


def _option(name: str, value: str) -> list[str]:
    return [f"--{name}", *(value.split() if name == "data.digits" else [value])]


# -- processes ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Training:
    """A started process. Its output may be waited for line by line."""

    process: subprocess.Popen
    stderr_file: object
    out: str = ""

    def wait_for(self, text: str) -> None:
        """Reads lines until one has the text in it."""
        for line in self.process.stdout:
            self.out += line
            if text in line:
                return
        raise AssertionError(f"{text!r} was never printed:\n{self.out}\n{self.err}")

    def wait_for_error_line(self, text: str) -> None:
        """The same for stderr, which is read from a file."""
        while text not in self.err:
            assert self.process.poll() is None, f"{text!r} was never printed:\n{self.err}"
            time.sleep(0.01)

    def wait_for_handler(self, number: signal.Signals) -> None:
        """Returns once the process catches the signal; fails if it has gone further than that by then."""
        while self.process.poll() is None:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
            if int(caught.split()[1], 16) >> (number - 1) & 1 and "train.main" in self.command_line:
                return
            time.sleep(0.002)
        raise AssertionError(f"the process ended by itself:\n{self.err}")

    @property
    def command_line(self) -> str:
        return Path(f"/proc/{self.process.pid}/cmdline").read_text().replace("\0", " ")

    @property
    def err(self) -> str:
        return Path(self.stderr_file.name).read_text()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def finish(self, status: int = 0) -> tuple[str, str]:
        """All of stdout and stderr, after it has ended with this status and without a traceback."""
        try:
            out, _ = self.process.communicate(timeout=300)
        finally:
            self.process.kill()
        self.out += out
        shown = f"exit status {self.process.returncode}\n{self.out}\n{self.err}"
        assert self.process.returncode == status, shown
        assert "Traceback" not in self.err, shown
        return self.out, self.err


def start(cache: Path, *options: str, hook: Sequence[str] = (), devices: int = 1) -> Training:
    """Starts ``python -m train.main`` with these options, or the hook of that name before it."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": simulated_devices(devices),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    module = ["tests.train.run_training", *hook, "--"] if hook else ["train.main"]
    command = [sys.executable, "-m", *module, *options]
    stderr_file = tempfile.NamedTemporaryFile("w+", suffix=".err")  # noqa: SIM115
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=stderr_file
    )
    return Training(process, stderr_file)


def run(cache: Path, *options: str, status: int = 0, **how) -> tuple[str, str]:
    """Starts and finishes."""
    return start(cache, *options, **how).finish(status)


def the_error(err: str) -> str:
    """The one line that stderr has for a user's mistake."""
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err, err
    return lines[0]


# -- shared by all tests of a session ----------------------------------------------------------------------------------


def shared_directory(tmp_path_factory) -> Path:
    """One directory for all the test processes of a session."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    directory = base / "training"
    directory.mkdir(exist_ok=True)
    return directory


def made_once(directory: Path, make: Callable[[Path], object]) -> Path:
    """A directory that the first test process to ask for it makes."""
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not Path(f"{directory}.done").exists():
            make(directory)
            Path(f"{directory}.done").touch()
    return directory


def cache_directory(tmp_path_factory) -> Path:
    """The compilation cache of the session."""
    return shared_directory(tmp_path_factory) / "cache"


def straight_run(tmp_path_factory) -> Path:
    """A finished run without any interruption; what it printed is in its ``stdout.txt``."""
    cache = cache_directory(tmp_path_factory)

    def make(directory):
        out, err = run(cache, *tiny(directory))
        (directory / "stdout.txt").write_text(out)
        (directory / "stderr.txt").write_text(err)

    return made_once(shared_directory(tmp_path_factory) / "straight", make)


# -- in this process ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_this_process(cache: Path) -> Iterator[None]:
    """JAX as ``start`` sets it up, for calls of ``call``."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(cache))
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def call(capfd, *options: str, stop=None) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command, in this process."""
    from sana_jax.errors import run_command_line
    from train.main import main

    capfd.readouterr()
    try:
        run_command_line(lambda: main(list(options), stop))
    except SystemExit as leaving:
        out, err = capfd.readouterr()
        return leaving.code, out, err
    raise AssertionError("run_command_line returned")


# -- what a run has left -----------------------------------------------------------------------------------------------


def saved_steps(run_dir: Path) -> list[int]:
    from sana_jax.weights import checkpoint_steps

    return checkpoint_steps(run_dir / "checkpoints")


def saved_state(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path: parameters, average, optimizer."""
    import jax
    import orbax.checkpoint as ocp

    from train.sharding import path_name

    arrays = {}
    for item in ("params", "ema", "opt_state"):
        path = (run_dir / "checkpoints" / str(step) / item).absolute()
        if item == "ema" and not path.exists():
            continue
        if item == "ema" and not path.is_dir():
            continue  # a run without an average
        handler = ocp.PyTreeCheckpointHandler()
        metadata = handler.metadata(path).tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        tree = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        arrays |= {
            f"{item}/{path_name(key)}": np.asarray(leaf) for key, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
    return arrays


def saved_progress(run_dir: Path, step: int) -> dict:
    return json.loads((run_dir / "checkpoints" / str(step) / "progress" / "metadata").read_text())


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def exact_rows(run_dir: Path) -> list[dict]:
    return [{name: row[name] for name in EXACT_COLUMNS} for row in rows(run_dir)]


def pixels(run_dir: Path, step: int) -> np.ndarray:
    from PIL import Image

    with Image.open(run_dir / "samples" / f"step_{step:06d}.png") as image:
        return np.asarray(image)


def assert_same_run(got: Path, want: Path, step: int = STEPS) -> None:
    """Fails unless both runs have, bit for bit, the same state, place in the data, rows and, if any, last preview."""
    have, expected = saved_state(got, step), saved_state(want, step)
    assert have.keys() == expected.keys()
    assert [name for name in expected if have[name].tobytes() != expected[name].tobytes()] == []
    assert saved_progress(got, step)["data_position"] == saved_progress(want, step)["data_position"]
    assert exact_rows(got) == exact_rows(want)
    if (want / "samples").exists():
        np.testing.assert_array_equal(pixels(got, step), pixels(want, step))


def left_behind(directory: Path) -> list[str]:
    """Files with temporary names."""
    return [str(path) for path in directory.rglob("*") if path.name.endswith(".tmp") or "checkpoint-tmp" in path.name]


# -- hooks -------------------------------------------------------------------------------------------------------------


def files_stay_below(size: str) -> None:
    """Writing past this many bytes of a file fails, as on a full disk."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), hard))


def saves_take_long() -> None:
    """Says when a save begins, which then does not end."""
    from train.checkpoints import CheckpointStore

    def save(store, step, **kwargs):
        print("saving begins", flush=True)
        time.sleep(600)

    CheckpointStore.save = save


def previews_take_long() -> None:
    """Says when a preview begins, which then does not end."""
    from sana_jax.autoencoders import PixelAutoencoder

    def decode(autoencoder, latents):
        print("decoding begins", flush=True)
        time.sleep(600)

    PixelAutoencoder.decode = decode


def preparing_takes(seconds: str, pictures: str = "4") -> None:
    """A batch of so many pictures takes so long to prepare, and each is a shard of its own."""
    from sana_jax.autoencoders import PixelAutoencoder
    from train.data import encoding, shard_filler

    shard_filler.SHARD_SECONDS = 0.0
    encoding._MOST_PICTURES = int(pictures)
    encode = PixelAutoencoder.encode

    def slowly(*arguments, **options):
        time.sleep(float(seconds))
        return encode(*arguments, **options)

    PixelAutoencoder.encode = slowly


def preparing_waits_for(path: str) -> None:
    """Pictures are prepared once there is a file."""
    from sana_jax.autoencoders import PixelAutoencoder

    encode = PixelAutoencoder.encode

    def later(*arguments, **options):
        while not Path(path).exists():
            time.sleep(0.01)
        return encode(*arguments, **options)

    PixelAutoencoder.encode = later


def start_with_hook() -> None:
    from sana_jax.errors import run_command_line
    from train.main import main

    end = sys.argv.index("--")
    hook, *arguments = sys.argv[1:end]
    globals()[hook](*arguments)
    run_command_line(lambda: main(sys.argv[end + 1 :]))


if __name__ == "__main__":
    start_with_hook()
