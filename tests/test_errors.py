"""What a command says when it ends early."""

from __future__ import annotations

import subprocess
import sys

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
