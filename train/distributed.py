"""Joining the processes of a run before JAX looks at any device."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import jax
import numpy as np

from configs.changes import CONDITIONS, PLACES, all_differences, with_absolute_places
from configs.schema import DistributedConfig, RunConfig
from configs.serialization import from_dict, to_dict
from sana_jax.errors import UserError, reason_of

if TYPE_CHECKING:
    from train.assembly import TrainingData

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_LOCALID")  # what JAX reads
_PATIENCE = 10.0  # seconds in which processes that all meet the same error have ended together
_GONE = re.compile("by peer|Broken pipe|remote process exited")  # what Gloo and NCCL say of another process
_MESSAGE = 8192  # bytes: more than the longest path, or 900 letters of an error
_FAILED = "failed: "  # how the message of a process begins that cannot go on


class ElsewhereError(UserError):
    """What went wrong in another process."""


def join_processes(config: DistributedConfig) -> None:
    """Connects to the run's other processes, if there are any.

    Explicit options come first, then ``JAX_COORDINATOR_ADDRESS`` with ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``,
    then SLURM's variables. Without any of them the run has one process. One that is alone on its host has all of the
    host's devices; of SLURM's tasks that share a host each has one.

    Raises:
        UserError: some but not all of what is needed is given, or the processes do not find one another.
    """
    given = (config.coordinator, config.num_processes, config.process_id)
    if any(value is not None for value in given):
        names = ("coordinator", "num-processes", "process-id")
        if missing := [name for name, value in zip(names, given) if value is None]:
            raise UserError(
                f"--distributed.{missing[0]} is missing; coordinator, num-processes and process-id go together: give "
                "all three, or none"
            )
        _initialize(*given)
    elif address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        variables = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        values = [os.environ.get(variable, "") for variable in variables]
        for variable, value in zip(variables, values):
            if not value.isdecimal():
                raise UserError(
                    f"JAX_COORDINATOR_ADDRESS is set but {variable} is {value!r}; it must be a whole number: export "
                    "it too, or unset JAX_COORDINATOR_ADDRESS"
                )
        _initialize(address, *map(int, values))
    elif _slurm_tasks() > 1 and "SLURM_PROCID" in os.environ:
        if missing := [name for name in _SLURM if not os.environ.get(name)]:
            raise UserError(
                f"SLURM gives this process {_slurm_tasks()} tasks but no {missing[0]}, as where srun did not start it: "
                "put srun before the command, or unset SLURM_PROCID to train in this process alone"
            )
        _initialize(None, _slurm_tasks(), int(os.environ["SLURM_PROCID"]))  # JAX finds the address itself


def _slurm_tasks() -> int:
    """Of this step, which in an interactive allocation is one task, whatever the allocation is for; 1 without SLURM."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)


def describe_processes() -> str:
    """Which devices this run has, for its first lines."""
    devices = jax.devices()
    kind = f"{len(devices)} x {devices[0].device_kind}"
    if jax.process_count() == 1:
        return kind
    return f"{kind} over {jax.process_count()} processes"


def gather_messages(message: str, size: int = _MESSAGE) -> list[str]:
    """Every process's message, cut to ``size`` bytes, on every process.

    Raises:
        ElsewhereError: another process has left ``Preparation`` with an error.
    """
    if jax.process_count() == 1:
        return [message]
    messages = _gather(message, size)
    for index, text in enumerate(messages):
        if text.startswith(_FAILED):
            raise ElsewhereError(f"process {index} could not go on: {text.removeprefix(_FAILED)}")
    return messages


def _gather(message: str, size: int = _MESSAGE) -> list[str]:
    from jax.experimental import multihost_utils

    buffer = np.zeros(size, np.uint8)
    encoded = message.encode(errors="surrogateescape")[:size]  # paths may be in any encoding
    buffer[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    gathered = multihost_utils.process_allgather(buffer)
    return [bytes(row).rstrip(b"\0").decode(errors="surrogateescape") for row in gathered]


class Preparation:
    """What comes before the first step. An error of one process ends the others too, which would wait for it.

    Until ``agree`` processes meet in nothing but ``gather_messages``, where the others wait when one fails, and are
    told its error. From there on it leaves alone, and they see in the next step that it is gone.
    """

    def __init__(self):
        self._agreed = False

    def __enter__(self) -> Preparation:
        return self

    def agree(self, dataset: TrainingData, *facts: object) -> None:
        """The end of it: from here on processes meet in other ways, with the same samples, weights and checkpoints.

        Args:
            dataset: whose captions and buckets are the same in all processes.
            facts: what else is; their texts are compared.

        Raises:
            UserError: on every process, these are not.
        """
        if jax.process_count() == 1:  # millions of captions are not read for nothing
            return
        digest = hashlib.sha256(repr((dataset.captions, *facts)).encode())
        for shape, indices in dataset.buckets.items():
            digest.update(repr(shape).encode() + np.asarray(indices).tobytes())
        digests = gather_messages(digest.hexdigest())
        self._agreed = True
        for index, other in enumerate(digests):
            if other != digests[0]:
                raise UserError(
                    f"process {index} finds other samples, checkpoints or weights of --model than process 0; all "
                    "processes of a run read the same: put them where all hosts see them, or copy them anew"
                )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if jax.process_count() == 1 or not isinstance(error, Exception):
            return
        # A program that runs in the thread that calls it, as on a CPU, raises it as a ValueError.
        gone = isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and _GONE.search(str(error)) is not None
        if not self._agreed and not gone and not isinstance(error, ElsewhereError):
            _gather(_FAILED + reason_of(error, 900))
        if self._agreed or gone:
            _leave_soon(2 if gone or isinstance(error, UserError) else 1)
        if gone:
            raise ElsewhereError(
                f"another process of this run has ended ({reason_of(error)}): its own output says why; mend that and "
                "start all of them again, which go on from the newest checkpoint"
            ) from error


def _leave_soon(status: int) -> None:
    """Ends this process in a while, should it wait then: JAX lets none go before the others do, which wait for it."""
    timer = threading.Timer(_PATIENCE, os._exit, (status,))
    timer.daemon = True
    timer.start()


def agree_on_options(config: RunConfig) -> None:
    """Asks whether all processes were started with the same options; only places may be called otherwise on each.

    With others each would train something else unnoticed, or wait for the rest for ever.

    Raises:
        UserError: on every process, in what one of them differs from the first.
    """
    own = json.dumps(to_dict(with_absolute_places(config)))
    texts = gather_messages(own, max(map(int, gather_messages(str(len(own.encode()))))))
    configs = [from_dict(RunConfig, json.loads(text), f"the options of process {n}") for n, text in enumerate(texts)]
    for index, other in enumerate(configs):
        for name, (there, here) in all_differences(configs[0], other).items():
            of_places = name == CONDITIONS and _without_places(there) == _without_places(here)
            if name not in ("run_dir", *PLACES) and not name.startswith("distributed.") and not of_places:
                raise UserError(
                    f"--{name.replace('_', '-')} is {there!r} in process 0 and {here!r} in process {index}; all "
                    "processes of a run have the same options, but for --distributed.process-id: give each the same "
                    "command"
                )
    _agree_on_run_dir(Path(config.run_dir).absolute())


def _without_places(conditions: Sequence[str] | None) -> list[str]:
    return [text.partition(":")[0] for text in conditions or ()]


def _agree_on_run_dir(run_dir: Path) -> None:
    """Raises ``UserError`` on every process unless all see one directory there, by whatever name."""
    if jax.process_count() == 1:
        return
    folder = next(path for path in (run_dir, *run_dir.parents) if os.path.isdir(path))
    rest, mark = str(run_dir.relative_to(folder)), None
    try:
        if jax.process_index() == 0:
            mark = tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".tmp")  # noqa: SIM115
    except OSError:
        pass  # which is asked again, and said, where the run is about to be written
    name = gather_messages("" if mark is None else Path(mark.name).name)[0]
    wanted = gather_messages(rest)[0]
    found = not name or (os.path.exists(folder / name) and rest == wanted)
    places = gather_messages(f"{found:d}{run_dir}")
    if mark is not None:
        mark.close()
    for index, place in enumerate(places):
        if place[0] == "0":
            raise UserError(
                f"--run-dir is {places[0][1:]} in process 0 and {place[1:]} in process {index}, which is not the same "
                "directory; all processes write into one: name one that all of them see, by its whole path"
            )


def on_first_process(action: Callable[[], Path | None]) -> Path | None:
    """Does something that makes a file or directory in one process, on a file system that all share.

    The other processes wait, and go on with the same path. What goes wrong is for ``Preparation`` to tell them.
    """
    if jax.process_count() == 1:
        return action()
    outcome = gather_messages("")[0]  # what takes hours begins where no process has failed yet
    if jax.process_index() == 0:
        outcome = f"made {path.absolute()}" if (path := action()) is not None else "stopped"
    kind, _, text = gather_messages(outcome)[0].partition(" ")
    return Path(text) if kind == "made" else None


def _initialize(coordinator: str | None, num_processes: int, process_id: int) -> None:
    if num_processes < 1:
        raise UserError(f"a run of {num_processes} processes; there are 1 or more: mend the number")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"process id {process_id} is not one of {num_processes} processes; allowed is 0 to {num_processes - 1}: "
            "give each process its own"
        )
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"the coordinator {coordinator!r} is not host:port; write it like 10.0.0.1:1234")
    if process_id == 0 and coordinator is not None:
        _require_free_port(int(coordinator.rpartition(":")[2]))
    # JAX would give every task of SLURM's one device, and leave idle the rest of a host that has one task.
    shared = _slurm_tasks() > int(os.environ.get("SLURM_STEP_NUM_NODES") or _slurm_tasks())
    devices = None if shared or "JAX_LOCAL_DEVICE_IDS" in os.environ else ()  # which is all
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, devices)
    except (RuntimeError, ValueError) as error:
        reason = reason_of(error, 300)
        raise UserError(
            f"the processes of this run did not find one another at {coordinator or 'the address SLURM gives'}: "
            f"{reason}; check that process 0 runs there and that the port is open"
        ) from error


def _require_free_port(port: int) -> None:
    """Asks before JAX does, whose coordinator takes the whole process down if the port is not to be had."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"process 0 cannot listen on port {port} of this machine ({error}); name another"
            ) from error
