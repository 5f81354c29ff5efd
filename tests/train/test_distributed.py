"""Real processes that find one another on this machine, through the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from configs import load_preset
from configs.schema import DistributedConfig
from configs.serialization import to_dict
from sana_jax import UserError
from train import distributed
from train.distributed import Preparation, agree_on_options, join_processes

ROOT = Path(__file__).parents[2]
TINY = [
    "--device",
    "cpu",
    "--batch-size",
    "16",
    "--transformer.num-layers",
    "1",
    "--transformer.num-attention-heads",
    "4",
    "--transformer.attention-head-dim",
    "8",
    "--transformer.num-cross-attention-heads",
    "2",
    "--transformer.cross-attention-head-dim",
    "16",
    "--transformer.cross-attention-dim",
    "32",
    "--optimizer.schedule",
    "constant",
    "--optimizer.warmup-steps",
    "1",
    "--logging.every",
    "1",
    "--logging.no-tensorboard",
    "--preview.every",
    "0",
    "--checkpoint.every",
    "2",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(arguments: list[str], cwd: Path = ROOT, code: str | None = None, **variables: str) -> subprocess.Popen:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    environment = inherited | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | quick | variables
    command = [sys.executable, *(["-m", "train.main"] if code is None else ["-c", code]), *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(*processes: subprocess.Popen, status: int = 0) -> list[tuple[str, str]]:
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=300))
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, outputs):
        assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err[-3000:]}"
    return outputs


def two_by_options(arguments: list[str], **how) -> list[subprocess.Popen]:
    options = ["--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.num-processes", "2"]
    return [start([*arguments, *options, "--distributed.process-id", str(index)], **how) for index in range(2)]


def two_by_environment(arguments: list[str]) -> list[subprocess.Popen]:
    variables = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    return [start(arguments, **variables, JAX_PROCESS_ID=str(index)) for index in range(2)]


def own_lines(out: str) -> list[str]:
    """What the program printed; the library that carries the collectives announces itself."""
    return [line for line in out.splitlines() if not line.startswith("[Gloo]")]


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> list[dict]:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    finish(start([*TINY, "--steps", "4", "--run-dir", str(run_dir)]))
    return rows(run_dir)


def assert_same_run(got: list[dict], expected: list[dict]) -> None:
    assert [row["step"] for row in got] == [1, 2, 3, 4]
    for row, reference in zip(got, expected):
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
        assert row["param_norm"] == pytest.approx(reference["param_norm"], rel=1e-5)


def test_two_processes_with_half_the_batch_each(one_process, tmp_path):
    run_dir = tmp_path / "run"
    (out, _), (silent, _) = finish(
        *two_by_options([*TINY, "--steps", "2", "--mesh.data", "2", "--run-dir", str(run_dir)])
    )
    assert "over 2 processes, mesh data=2" in out
    assert own_lines(silent) == []  # only the first process prints
    assert rows(run_dir)[-1]["step"] == 2

    # resumed by two processes that are told of one another by the environment
    (out, _), (silent, _) = finish(*two_by_environment(["--resume", str(run_dir), "--steps", "4"]))
    assert "resumed at step 2 of 4" in out
    assert own_lines(silent) == []
    assert_same_run(rows(run_dir), one_process)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["2", "4"]


def test_two_processes_with_other_options(tmp_path):
    """They trained each with its own learning rate, and waited for ever where one had more steps."""
    run_dir, address = tmp_path / "run", f"127.0.0.1:{free_port()}"
    both = [*TINY, "--run-dir", str(run_dir), "--distributed.coordinator", address, "--distributed.num-processes", "2"]
    ends = finish(
        start([*both, "--steps", "2", "--distributed.process-id", "0"]),
        start([*both, "--steps", "3", "--distributed.process-id", "1"]),
        status=2,
    )
    for _, err in ends:
        assert "error: --steps is 2 in process 0 and 3 in process 1; all processes of a run have the same" in err
        assert "Traceback" not in err
    assert not run_dir.exists()


def two_places(arguments: list[str], tmp_path: Path) -> list[tuple[str, str]]:
    """What two processes print that are started in two directories, ``0`` and ``1``, and end with an error."""
    places = [tmp_path / "0", tmp_path / "1"]
    options = ["--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.num-processes", "2"]
    both = []
    for index, place in enumerate(places):
        place.mkdir(exist_ok=True)
        both.append(start([*arguments, *options, "--distributed.process-id", str(index)], cwd=place))
    ends = finish(*both, status=2)
    assert not any("Traceback" in err for _, err in ends)
    return ends


def test_two_processes_with_a_run_directory_each(tmp_path):
    """Each took its own for the run's: one resumed while the other began anew, and they waited for one another."""
    for _, err in two_places([*TINY, "--steps", "2", "--run-dir", "run"], tmp_path):
        assert f"error: --run-dir is {tmp_path}/0/run in process 0 and {tmp_path}/1/run in process 1, which is" in err
    assert [*tmp_path.glob("*/*")] == []  # nor the mark by which they find out


def test_what_fails_in_one_process_ends_the_others(tmp_path):
    """They waited for one that lacks the data, and it for them, for five minutes."""
    (tmp_path / "0").mkdir()
    finish(start([*TINY, "--steps", "2", "--run-dir", "base"], cwd=tmp_path / "0"))
    run_dir, pictures = tmp_path / "run", tmp_path / "pictures"
    pictures.mkdir()
    mine = ["digits_lora", "--device", "cpu", "--data.path", str(pictures), "--run-dir", str(run_dir)]
    (_, first), (_, second) = two_places([*mine, "--model", "base"], tmp_path)
    assert "error: process 1 could not go on: model base is not a directory here" in first
    assert "error: model base is not a directory here" in second
    assert not run_dir.exists()


UNREADABLE = """
import jax
from sana_jax.errors import UserError, run_command_line
from train import distributed, main
from train.data import DigitsData

def batch(*given):
    if jax.process_index() == 1 and next(calls) > 4:  # which the loader asks for ahead of the steps
        raise UserError("a picture is gone")
    return read(*given)

distributed._PATIENCE = 1.0
calls, read, DigitsData.batch = iter(range(99)), DigitsData.batch, batch
run_command_line(main.main)
"""


def test_what_fails_in_one_process_in_the_loop_ends_the_others(tmp_path):
    """It waited for the others in its own end, and they for it in the next step, for five minutes."""
    options = [*TINY, "--steps", "99", "--mesh.data", "2", "--run-dir", str(tmp_path / "run")]
    (_, first), (_, second) = finish(*two_by_options(options, code=UNREADABLE), status=2)
    assert "error: another process of this run has ended (" in first
    assert "Traceback" not in first
    assert second == "error: a picture is gone\n"


@pytest.mark.prove  # half the batch each runs with every commit
def test_two_processes_with_half_the_parameters_each(one_process, tmp_path):
    run_dir = tmp_path / "run"
    mesh = ["--mesh.data", "1", "--mesh.fsdp", "2"]
    (out, _), (silent, _) = finish(*two_by_options([*TINY, "--steps", "2", *mesh, "--run-dir", str(run_dir)]))
    assert "over 2 processes, mesh fsdp=2" in out
    assert own_lines(silent) == []

    # resumed by one process
    ((out, _),) = finish(start(["--resume", str(run_dir), "--steps", "4", "--mesh.fsdp", "1"]))
    assert "resumed at step 2 of 4" in out
    assert_same_run(rows(run_dir), one_process)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "127.0.0.1:1"}, "--distributed.num-processes is missing"),
        ({"num_processes": 2, "process_id": 0}, "--distributed.coordinator is missing"),
        ({"coordinator": "127.0.0.1:1", "num_processes": 2}, "--distributed.process-id is missing"),
        ({"coordinator": "127.0.0.1:1", "num_processes": 2, "process_id": 2}, "process id 2 .* allowed is 0 to 1"),
        ({"coordinator": "127.0.0.1:1", "num_processes": 2, "process_id": -1}, "process id -1 .* allowed is 0 to 1"),
        ({"coordinator": "127.0.0.1:1", "num_processes": 0, "process_id": 0}, "0 processes; .* 1 or more"),
        ({"coordinator": "127.0.0.1", "num_processes": 2, "process_id": 1}, "'127.0.0.1' is not host:port"),
    ],
)
def test_options_that_do_not_fit(given, message):
    with pytest.raises(UserError, match=message):
        join_processes(DistributedConfig(**given))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "JAX_NUM_PROCESSES is ''"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is ''"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES is 'two'"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "process id 2"),
    ],
)
def test_variables_that_do_not_fit(monkeypatch, variables, message):
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        join_processes(DistributedConfig())


def test_without_any_of_them_there_is_one_process(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    join_processes(DistributedConfig())
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    join_processes(DistributedConfig())


SRUN = {
    "SLURM_JOB_ID": "123",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
}
JOINED = """
import jax
from configs.schema import DistributedConfig
from train.distributed import join_processes
join_processes(DistributedConfig())
print(jax.process_index(), jax.process_count(), jax.config.values["jax_cuda_visible_devices"])
"""


def test_tasks_of_slurm(monkeypatch):
    """JAX gave each task one device: with one task per host, as the README has it, seven of eight were idle."""
    port = str(free_port())
    tasks = [start([], code=JOINED, **SRUN, JAX_COORDINATOR_PORT=port, SLURM_PROCID=str(index)) for index in range(2)]
    assert [own_lines(out) for out, _ in finish(*tasks)] == [["0 2 all"], ["1 2 all"]]

    found = []  # two tasks on one host
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: found.append(given))
    for name, value in (SRUN | {"SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "1"}).items():
        monkeypatch.setenv(name, value)
    join_processes(DistributedConfig())
    assert found == [(None, 2, 1, None)]


def test_slurm_without_srun(monkeypatch):
    """They were told that an address is not defined, or waited five minutes for tasks that srun had not started."""
    for name in ("JAX_COORDINATOR_ADDRESS", *SRUN):
        monkeypatch.delenv(name, raising=False)
    batch = {"SLURM_JOB_ID": "123", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for name, value in batch.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"2 tasks but no SLURM_STEP_NODELIST, .*: put srun before the command"):
        join_processes(DistributedConfig())
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # the shell of an interactive allocation
    join_processes(DistributedConfig())


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        options = ["--distributed.coordinator", address, "--distributed.num-processes", "1"]
        arguments = [*TINY, *options, "--distributed.process-id", "0", "--run-dir", str(tmp_path / "run")]
        ((_, err),) = finish(start(arguments), status=2)
    assert f"cannot listen on port {address.rpartition(':')[2]}" in err
    assert "Traceback" not in err


def test_data_checkpoints_and_weights_that_differ(monkeypatch):
    """Each process read its own list of prompts, and its own copy of the model."""
    dataset, found = SimpleNamespace(captions=["a dog"], buckets={(2, 2, 1): np.arange(3)}), []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "gather_messages", lambda message: found.append(message) or found)
    Preparation().agree(dataset, 4, "weights")
    Preparation().agree(dataset, 4, "weights")
    others = [
        (dataset, None, "weights"),
        (dataset, 4, "other weights"),
        (SimpleNamespace(captions=["a cat"], buckets=dataset.buckets), 4, "weights"),
        (SimpleNamespace(captions=["a dog"], buckets={(2, 2, 1): np.array([0, 2, 1])}), 4, "weights"),
    ]
    for other in others:
        del found[1:]
        with pytest.raises(UserError, match="process 1 finds other samples, checkpoints or weights of --model than"):
            Preparation().agree(*other)


@pytest.mark.parametrize("name", ["/".join(["r" * 200] * 8), "r\udce9"], ids=["long", "latin1"])
def test_any_run_directory_is_told_to_the_others(name, monkeypatch, tmp_path):
    """One of more than 1,024 bytes was refused as another one's; one whose name is no UTF-8 ended in a traceback."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda array: np.stack([array, array]))
    agree_on_options(dataclasses.replace(load_preset("digits"), run_dir=str(tmp_path / name)))


def test_places_in_conditions_may_be_called_otherwise(monkeypatch, tmp_path):
    """A SigLIP's directory made two hosts' options differ, where a model's did not."""
    digits = load_preset("siglip_zoom_lora")
    places = [("object=siglip:/a", "zoom=scalar"), ("object=siglip:/b", "zoom=scalar"), ("object=picture",)]
    configs = [
        dataclasses.replace(digits, data=dataclasses.replace(digits.data, conditions=place), run_dir=str(tmp_path))
        for place in places
    ]
    texts = [json.dumps(to_dict(config)) for config in configs]
    monkeypatch.setattr(distributed, "gather_messages", lambda message, size=9: [message] if size == 9 else texts[:2])
    agree_on_options(configs[0])
    texts[1] = texts[2]
    with pytest.raises(UserError, match=r"--data\.conditions is "):
        agree_on_options(configs[0])
