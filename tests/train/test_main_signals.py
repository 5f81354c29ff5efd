"""SIGTERM and Ctrl-C, whenever they come: nothing is lost, nothing half-written, no traceback."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest

from tests.train.run_training import (
    PREVIEW_EVERY,
    SAVE_EVERY,
    STEPS,
    assert_same_run,
    cache_directory,
    call,
    in_this_process,
    left_behind,
    saved_state,
    saved_steps,
    start,
    straight_run,
    tiny,
)
from train.preemption import ONE_REQUEST, StopRequest


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cache_directory(tmp_path_factory)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return straight_run(tmp_path_factory)


def receive(stop: StopRequest, number: signal.Signals) -> None:
    """Sends this process a signal and returns once it is known."""
    assert not stop.nothing_to_lose, "the process would end"
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 10
    while stop.signal is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert stop.signal == number


# -- before the first step: the process ends at once -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "status", "moment"),
    [
        (signal.SIGTERM, 0, "imports"),
        (signal.SIGINT, 130, "compiling the train step"),
        pytest.param(signal.SIGINT, 130, "imports", marks=pytest.mark.prove),
        pytest.param(signal.SIGTERM, 0, "compiling the train step", marks=pytest.mark.prove),
    ],
)
def test_while_it_starts(cache, tmp_path, number, status, moment):
    run_dir = tmp_path / "run"
    training = start(cache, *tiny(run_dir))
    if moment == "imports":
        training.wait_for_handler(signal.SIGTERM)
    else:
        training.wait_for(moment)
    sent = time.monotonic()
    training.send(number)
    out, err = training.finish(status)
    assert time.monotonic() - sent < 5
    assert err.splitlines()[-1] == f"{number.name}: stopping at once; nothing is lost, the same command continues"
    assert "compiled the" not in out
    assert not run_dir.exists()


@pytest.mark.prove
def test_in_the_preview_of_step_0(cache, tmp_path):
    run_dir = tmp_path / "run"
    training = start(cache, *tiny(run_dir), hook=["previews_take_long"])
    training.wait_for("decoding begins")
    training.send(signal.SIGTERM)
    _, err = training.finish(0)
    assert "nothing is lost, the same command continues" in err
    assert saved_steps(run_dir) == []
    assert left_behind(run_dir) == []


# -- after it: the state is saved first --------------------------------------------------------------------------------


def check_stopped(name: str, step: int, run_dir, status, out, err, expected_status=0) -> None:
    assert status == expected_status, err
    assert err.splitlines()[-1] == f"{name}: saving after this step, then stopping; once more to stop at once"
    last = out.splitlines()[-1]
    assert last.startswith(f"stopped by {name} after step {step} of {STEPS}; everything is saved, continue with: ")
    assert last.endswith(f"-m train.main --resume {run_dir}")
    assert saved_steps(run_dir)[-1] == step
    assert left_behind(run_dir) == []


def test_in_a_step_then_in_a_preview_then_in_a_save(cache, straight, tmp_path, capfd, monkeypatch):
    """One run that is stopped three times and then finished is the straight run."""
    run_dir = tmp_path / "run"
    options = tiny(run_dir)

    def stopped(options, patch_at, send_when, number=signal.SIGTERM):
        """The command, with a signal just before the original of ``patch_at`` is called for the first time."""
        request = StopRequest()
        owner, name = patch_at
        original = getattr(owner, name)

        def first(*args, **kwargs):
            result = original(*args, **kwargs) if name == "save" else None  # the asynchronous save is under way
            if request.signal is None and send_when(*args):
                receive(request, number)
            return result if name == "save" else original(*args, **kwargs)

        with monkeypatch.context() as patch, in_this_process(cache):
            patch.setattr(owner, name, first)
            try:
                return call(capfd, *options, stop=request)
            finally:
                request.close()

    from sana_jax.autoencoders import PixelAutoencoder
    from train.checkpoints import CheckpointStore
    from train.data import Loader

    calls = []
    outcome = stopped(options, (Loader, "__next__"), lambda loader: calls.append(1) or len(calls) == 4, signal.SIGINT)
    check_stopped("SIGINT", 4, run_dir, *outcome, expected_status=130)

    outcome = stopped(["--resume", str(run_dir)], (PixelAutoencoder, "decode"), lambda *_: True)
    check_stopped("SIGTERM", PREVIEW_EVERY, run_dir, *outcome)
    assert (run_dir / "samples" / f"step_{PREVIEW_EVERY:06d}.png").exists()

    outcome = stopped(options, (CheckpointStore, "save"), lambda store, step: step == 2 * SAVE_EVERY)
    check_stopped("SIGTERM", 2 * SAVE_EVERY, run_dir, *outcome)
    have, want = saved_state(run_dir, 2 * SAVE_EVERY), saved_state(straight, 2 * SAVE_EVERY)
    assert [name for name in want if have[name].tobytes() != want[name].tobytes()] == []

    with in_this_process(cache):
        status, out, err = call(capfd, "--resume", str(run_dir))
    assert status == 0, err
    assert f"resumed at step {2 * SAVE_EVERY} of {STEPS}" in out
    assert_same_run(run_dir, straight)


@pytest.mark.prove
def test_in_the_middle_of_a_real_process_that_joined_others(cache, tmp_path):
    """Joining takes SIGTERM away from the program, which must take it back."""
    run_dir = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    alone = {"distributed__coordinator": address, "distributed__num_processes": 1, "distributed__process_id": 0}
    training = start(cache, *tiny(run_dir, steps=100000, **alone))
    training.wait_for("step 6/100000")
    training.send(signal.SIGTERM)
    out, err = training.finish(0)
    assert "SIGTERM: saving after this step, then stopping" in err
    last = out.splitlines()[-1]
    assert last.startswith(f"stopped by SIGTERM after step {saved_steps(run_dir)[-1]} of 100000; everything is saved")
    assert last.endswith(f"-m train.main --resume {run_dir}")
    assert left_behind(run_dir) == []


@pytest.mark.prove
def test_a_second_signal_ends_at_once_and_the_last_checkpoint_stands(cache, tmp_path):
    run_dir = tmp_path / "run"
    training = start(cache, *tiny(run_dir), hook=["saves_take_long"])
    training.wait_for("saving begins")
    training.send(signal.SIGTERM)
    training.wait_for_error_line("once more to stop at once")
    training.send(signal.SIGTERM)  # an echo of the first, as make and job runners make it
    time.sleep(ONE_REQUEST + 0.5)
    assert training.process.poll() is None
    sent = time.monotonic()
    training.send(signal.SIGTERM)
    _, err = training.finish(128 + signal.SIGTERM)
    assert time.monotonic() - sent < 5
    assert "SIGTERM again: stopping at once; the last checkpoint stands" in err


def test_the_signals_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stop = StopRequest()
    assert signal.getsignal(signal.SIGTERM) is not before[0]
    stop.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
