"""What a command says when it ends early."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sana_jax.errors import counted, reason_of, run_command_line
from sana_jax.weights.messages import one_line

PROGRAM = """
from sana_jax.errors import run_command_line

def main():
    for line in range(100_000):
        print("a line of many")

run_command_line(main)
"""


def test_a_reader_that_has_enough():
    """As ``command | head`` has."""
    writer = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline() == "a line of many\n"
    writer.stdout.close()
    assert writer.stderr.read() == ""
    assert writer.wait(60) == 141
    writer.stderr.close()


INTERRUPTED = """
import atexit, os
from sana_jax.errors import run_command_line

def main():
    atexit.register(os.abort)  # as the compiler's threads do when the interpreter is taken down around them
    print("what was said before")
    raise KeyboardInterrupt("go on with --resume")

run_command_line(main)
"""


def test_an_interrupt_ends_the_process_at_once():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    said = (done.returncode, done.stdout, done.stderr)
    assert said == (130, "what was said before\n", "interrupted: go on with --resume\n")


FOREIGN = """
from sana_jax.errors import run_command_line

run_command_line(lambda: print("for example: ein Stra\\u00dfenbild"))
"""


def test_letters_that_the_output_has_no_bytes_for():
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "for example: ein Stra\\xdfenbild\n", "")


@pytest.mark.parametrize(("message", "hinted"), [("CUDNN_STATUS_EXECUTION_FAILED", True), ("out of range", False)])
def test_a_failure_of_cudnn_says_what_needs_none(message, hinted, capsys):
    def main():
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=message):
        run_command_line(main)
    said = capsys.readouterr().err
    assert said.startswith("hint: XLA's own forms need no cuDNN: --kernels xla") == hinted
    assert bool(said) == hinted


NO_SUCH_PLATFORM = """
import jax
from sana_jax.errors import run_command_line

run_command_line(lambda: print(jax.local_devices()))
"""


@pytest.mark.parametrize("platforms", ["cuda", "gpu", "nonsense"])
def test_a_platform_that_is_not_here_is_one_line(platforms):
    """As a cluster's environment asks for GPUs on a machine without any."""
    environment = {**os.environ, "JAX_PLATFORMS": platforms, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", NO_SUCH_PLATFORM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert f"JAX_PLATFORMS={platforms}, as the environment asks (" in said[0]
    assert "Traceback" not in done.stderr


def test_a_number_and_what_it_counts():
    assert [counted(count, "block") for count in (0, 1, 2)] == ["0 blocks", "1 block", "2 blocks"]


@pytest.mark.parametrize("words", [reason_of, one_line])
def test_a_reason_is_one_line_and_never_empty(words):
    assert words(ValueError("two\n  lines\t of it\n")) == "two lines of it"
    assert words(OSError()) == words(OSError(" \n")) == "OSError"
    assert words(ValueError("é" * 9), 9) == "é" * 9
    assert words(ValueError("a " * 9), 9) == "a a a ..."


def test_a_storage_specification_is_left_out():
    assert one_line(ValueError("NOT_FOUND: it\nis gone [tensorstore_spec='{...}']")) == "NOT_FOUND: it is gone"
    assert one_line(ValueError(" [tensorstore_spec='{...}']")) == "ValueError"
