"""The PyTorch side of a comparison: a process of its own that is asked for one run at a time.

PyTorch and diffusers are no part of the library, so that the program that runs them stands among the tests of a
checkout (``tests/benchmarks/torch_side.py``) and is spoken with through pipes, a line of JSON each way. Two processes
also keep two sets of CUDA libraries and of threads apart, while runs of both sides still take turns.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from sana_jax.errors import UserError

_ROOT = pathlib.Path(__file__).parents[2]
_MODULE = "tests.benchmarks.torch_side"


def check_other_side() -> None:
    """Raises ``UserError`` where PyTorch's side cannot run, before any work is done."""
    missing = [name for name in ("torch", "diffusers", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--against diffusers: {', '.join(missing)} not installed; install them (pip install '.[test]'), or leave "
            "--against out"
        )
    if not (_ROOT / (_MODULE.replace(".", "/") + ".py")).is_file():
        raise UserError(
            f"--against diffusers: {_MODULE} is not here; it is part of the repository and not of the installed "
            "library: run the command from a checkout, or leave --against out"
        )


class OtherSide:
    """One case on PyTorch's side; a context manager that ends the process.

    Args:
        case: what ``tests/benchmarks/torch_side.py`` builds, as JSON: its ``kind`` and the shapes.
    """

    def __init__(self, case: Mapping[str, Any]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by close
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.told = self._ask({"prepare": dict(case)})
        except BaseException:
            self.close()
            raise

    def run(self) -> dict[str, float]:
        """Seconds of each stage of one run, waited for on its device."""
        return self._ask({"run": True})["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> OtherSide:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died; what it said last is read below
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise UserError(f"--against diffusers: PyTorch's side failed: {answer['error']}; see that, or leave it out")
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1] if lines else "the process ended without a word"
