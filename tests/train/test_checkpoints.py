from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sana_jax import CheckpointError, UserError
from sana_jax.weights import (
    TEMPORARY_MARK,
    abstract_tree,
    checkpoint_steps,
    load_checkpoint_params,
    load_params,
    save_params,
)
from tests.simulated_devices import simulated_devices
from tests.train.checkpoint_worker import CONFIG, open_store, position, same_bits, save, state

ROOT = Path(__file__).parents[2]


def start(mode: str, *arguments, devices: int = 1) -> subprocess.Popen:
    environment = os.environ | {
        "XLA_FLAGS": simulated_devices(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.train.checkpoint_worker", mode, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
    return out, err


def run(mode: str, *arguments, devices: int = 1, status: int = 0) -> tuple[str, str]:
    return finish(start(mode, *arguments, devices=devices), status)


def abstract(step: int = 0):
    return [abstract_tree(tree) for tree in state(step)]


def one_line_error(call, *contain: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in contain:
        assert part in message, message
    return message


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory):
    """A directory with the steps 100, 200 and 300; copied, never changed."""
    directory = tmp_path_factory.mktemp("runs") / "checkpoints"
    with open_store(directory) as store:
        for step in (100, 200, 300):
            save(store, step)
    return directory


@pytest.fixture
def checkpoints(three_checkpoints, tmp_path):
    return Path(shutil.copytree(three_checkpoints, tmp_path / "checkpoints"))


# -- saving and restoring ----------------------------------------------------------------------------------------------


def test_what_is_restored_is_bit_for_bit_what_was_saved(checkpoints):
    with open_store(checkpoints) as store:
        assert store.steps() == [100, 200, 300]
        assert store.latest_step() == 300
        for step, asked in ((300, None), (100, 100)):
            restored = store.restore(*abstract(), step=asked)
            assert restored.step == step
            assert restored.data_position == position(step)
            assert restored.config == CONFIG
            assert restored.versions["jax"] == jax.__version__
            for got, want in zip((restored.params, restored.ema, restored.opt_state), state(step)):
                same_bits(got, want)
    assert type(restored.opt_state[1][0]) is optax.ScaleByAdamState
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves((restored.params, restored.opt_state))}
    assert dtypes == {"float32", "bfloat16", "int32"}


def test_odd_values_keep_their_bits(tmp_path):
    bits = np.array([0x80000000, 0x7FC12345, 0xFF800000, 0x00000001], np.uint32)
    params = {"odd": jnp.asarray(bits.view(np.float32)), "empty": {}, "one": jnp.asarray(2.5)}
    with open_store(tmp_path, asynchronous=False) as store:
        store.save(1, params=params, ema=None, opt_state={"k": jnp.zeros(2)}, data_position=None, config={})
        restored = store.restore(abstract_tree(params), None, {"k": jnp.zeros(2)})
    assert np.asarray(restored.params["odd"]).tobytes() == bits.tobytes()
    assert jax.tree.structure(restored.params) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1),
        optax.multi_transform({"a": optax.adam(1e-3), "b": optax.set_to_zero()}, {"x": "a", "y": "b"}),
        optax.MultiSteps(optax.adafactor(1e-3), 2),
        optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    ],
    ids=["no arrays at all", "masked", "accumulated", "hyperparameters"],
)
def test_optimizer_states_of_other_shapes(tmp_path, optimizer):
    params = {"x": jnp.ones((4, 4)), "y": jnp.ones(3)}
    opt_state = optimizer.init(params)
    with open_store(tmp_path, asynchronous=False) as store:
        store.save(1, params=params, ema=None, opt_state=opt_state, data_position=0, config={})
        restored = store.restore(params, None, abstract_tree(opt_state))
    same_bits(restored.opt_state, opt_state)


def test_a_state_that_moves_on_while_it_is_written_is_saved_as_it_was(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 7, tree), donate_argnums=0)
    params = jax.jit(lambda: {str(i): jax.random.normal(jax.random.key(i), (512, 512)) for i in range(8)})()
    want = jax.tree.map(lambda leaf: np.array(leaf, copy=True), params)
    with open_store(tmp_path) as store:
        store.save(1, params=params, ema=None, opt_state={"n": jnp.zeros(1)}, data_position=0, config={})
        for _ in range(3):
            params = step(params)
        jax.block_until_ready(params)
        same_bits(store.restore(abstract_tree(want), None, {"n": jnp.zeros(1)}).params, want)


def test_saved_on_eight_devices_restored_on_one_and_on_four(tmp_path):
    assert "saved on 8" in run("save_on_all_devices", tmp_path, devices=8)[0]
    fewer = [start("restore_on_all_devices", tmp_path, devices=n) for n in (1, 4)]
    assert [finish(process)[0].strip() for process in fewer] == ["restored on 1", "restored on 4"]


def start_two(mode: str, directory: Path) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start(mode, directory, index, port, devices=2) for index in (0, 1)]


def test_two_processes_save_restore_and_see_the_same_damage(tmp_path):
    for index, process in enumerate(start_two("one_of_two_processes", tmp_path)):
        out, _ = finish(process)
        assert f"process {index}: the checkpoint {tmp_path / '200'} (step 200) is damaged: params/manifest.ocdbt" in out
    assert checkpoint_steps(tmp_path) == [200]


def test_a_save_says_what_it_cost(tmp_path, capfd):
    with open_store(tmp_path) as store:
        record = save(store, 1)
        store.wait()
        assert record is store.last_save
        files = [f for f in tmp_path.rglob("*") if f.is_file() and f.parent != tmp_path / "1"]
        assert record.disk_bytes == sum(f.stat().st_size for f in files)
        assert record.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state(1)))
        assert record.blocked_seconds > 0
        assert record.total_seconds > 0
        times = [save(store, step, wait=True).blocked_seconds for step in (2, 3, 4)]
    assert min(times) < 0.5
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, None, [7]), (3, None, [5, 6, 7]), (2, 3, [3, 6, 7]), (1, 2, [2, 4, 6, 7])],
)
def test_which_checkpoints_stay(tmp_path, keep_last, keep_every, kept):
    tree = {"w": jnp.ones(2)}
    for steps in (range(1, 4), range(4, 8)):  # the second store finds what the first one left
        with open_store(tmp_path, keep_last, keep_every) as store:
            for step in steps:
                store.save(step, params=tree, ema=None, opt_state=tree, data_position=step, config={})
    assert checkpoint_steps(tmp_path) == kept


def test_a_run_without_averaged_weights(tmp_path, checkpoints):
    params, ema, opt_state = abstract()
    with open_store(tmp_path / "plain", asynchronous=False) as store:
        tree = jax.tree.map(jnp.asarray, state(5)[0])
        store.save(5, params=tree, ema=None, opt_state=tree, data_position=0, config={})
        assert store.restore(params, None, params).ema is None
        one_line_error(lambda: store.restore(params, ema, params), "saved without averaged weights", "config.json")
    with open_store(checkpoints) as store:
        one_line_error(lambda: store.restore(params, None, opt_state), "saved with averaged weights", "config.json")


def test_misuse_is_named(tmp_path, checkpoints):
    with pytest.raises(UserError, match="keep_last=0"):
        open_store(tmp_path, keep_last=0)
    with pytest.raises(UserError, match="keep_every=0"):
        open_store(tmp_path, keep_every=0)
    with pytest.raises(UserError, match="gs://bucket"):
        open_store("gs://bucket/run")
    with open_store(checkpoints) as store:
        one_line_error(lambda: save(store, 300), "step 300 exists already", str(checkpoints))
        tree = {"w": jnp.ones(2)}
        with pytest.raises(ValueError, match="does not survive JSON"):
            store.save(400, params=tree, ema=None, opt_state=tree, data_position=(1, 2), config={})
    assert checkpoint_steps(checkpoints) == [100, 200, 300]


def test_going_back_to_an_older_step(checkpoints, capsys):
    with open_store(checkpoints) as store:
        assert store.restore(*abstract(), step=100).step == 100
        assert store.delete_after(100) == [200, 300]
        assert "deleting steps 200, 300" in capsys.readouterr().out
        save(store, 200, wait=True)
        assert store.steps() == [100, 200]


# -- nothing to restore, or damaged ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["absent", "empty", "only half-written"])
def test_resume_without_checkpoints(tmp_path, what):
    directory = tmp_path / "checkpoints"
    if what != "absent":
        directory.mkdir()
    with open_store(directory) as store:
        if what == "only half-written":
            (directory / f"100{TEMPORARY_MARK}").mkdir()
        assert store.latest_step() is None
        one_line_error(lambda: store.restore(*abstract()), f"no checkpoint in {directory}", "name a run directory")
    assert directory.exists() == (what != "absent")


def test_a_step_that_is_not_there(checkpoints):
    with open_store(checkpoints) as store:
        one_line_error(lambda: store.restore(*abstract(), step=250), "no checkpoint of step 250", "100, 200, 300")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def every_file(step_dir: Path) -> list[str]:
    return [f.relative_to(step_dir).as_posix() for f in sorted(step_dir.rglob("*")) if f.is_file()]


@pytest.mark.parametrize("damage", [cut, Path.unlink, flip_a_bit], ids=["cut", "missing", "one bit changed"])
def test_damage_to_any_file_is_found_before_anything_is_read(checkpoints, damage, capfd):
    """Every file of every item in turn; Orbax alone would load most of these, and changed bits always."""
    whole = checkpoints.parent / "whole"
    shutil.copytree(checkpoints / "300", whole)
    tried = 0
    with open_store(checkpoints) as store:
        for name in every_file(whole):
            if name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
                continue  # not read, see the next test
            path = checkpoints / "300" / name
            damage(path)
            one_line_error(
                lambda: store.restore(*abstract()),
                f"{checkpoints / '300'} (step 300) is damaged: ",
                name,
                "other steps that exist: 100, 200; delete it and resume from step 200",
            )
            shutil.copy(whole / name, path)
            tried += 1
        assert tried > 25
        assert store.restore(*abstract()).step == 300
    assert capfd.readouterr() == ("", "")


def test_damage_to_orbax_bookkeeping_does_no_harm(checkpoints):
    (checkpoints / "300" / "commit_success.txt").unlink()
    (checkpoints / "200" / "_CHECKPOINT_METADATA").write_text('{"broken')
    (checkpoints / "300" / "_CHECKPOINT_METADATA").unlink()
    with open_store(checkpoints, keep_last=3) as store:
        assert store.restore(*abstract()).step == 300
        save(store, 400, wait=True)
        assert store.steps() == [200, 300, 400]


@pytest.mark.parametrize("item", ["params", "ema", "opt_state", "progress"])
def test_a_missing_item_directory(checkpoints, item):
    shutil.rmtree(checkpoints / "300" / item)
    with open_store(checkpoints) as store:
        message = one_line_error(lambda: store.restore(*abstract()), f"{item} is missing", "resume from step 200")
    assert message.count("is missing") == 1


def test_the_advice_names_a_checkpoint_that_is_whole(checkpoints):
    shutil.rmtree(checkpoints / "100" / "params")
    cut(checkpoints / "200" / "manifest.json")
    cut(next((checkpoints / "300" / "ema").rglob("d/*")))
    with open_store(checkpoints) as store:
        one_line_error(lambda: store.restore(*abstract()), "exist: 100, 200; delete it and start the run from the beg")


def test_all_differences_come_in_one_message(checkpoints):
    params, ema, opt_state = abstract()
    params["blocks"]["attention"]["bias"] = jax.ShapeDtypeStruct((64,), jnp.float32)
    del ema["table"]
    ema["head"]["kernel"] = jax.ShapeDtypeStruct((64, 9), jnp.float32)
    ema["blocks"]["scale"] = jax.ShapeDtypeStruct((2, 64), jnp.float32)
    adam = opt_state[1][0]
    opt_state = (opt_state[0], (adam._replace(mu={}), *opt_state[1][1:]))
    with open_store(checkpoints) as store:
        one_line_error(
            lambda: store.restore(params, ema, opt_state),
            f"{checkpoints / '300'} does not fit this configuration, 8 differences: ",
            "params/blocks/attention/bias float32[64] is not in the checkpoint",
            "ema/table int32[16] is in the checkpoint only",
            "ema/head/kernel is float32[64,8] in the checkpoint, not float32[64,9]",
            "ema/blocks/scale is bfloat16[2,64] in the checkpoint, not float32[2,64]",
            "opt_state/1/0/mu/blocks/attention/kernel float32[2,64,64] is in the checkpoint only",
            "; and 3 more differences; resume with",
        )


# -- interrupted and refused writes ------------------------------------------------------------------------------------


def test_killed_while_saving(tmp_path, capsys):
    run("killed_while_saving", tmp_path, status=-9)
    half = tmp_path / f"300{TEMPORARY_MARK}"
    assert half.is_dir()
    assert load_checkpoint_params(tmp_path, abstract()[0])[1:] == (200, "ema")
    assert half.is_dir()  # a reader leaves it alone: the run may still be writing
    with open_store(tmp_path) as store:
        assert f"ignoring {half}, half-written when a run was stopped; removed" in capsys.readouterr().out
        restored = store.restore(*abstract())
        assert restored.step == 200
        same_bits(restored.opt_state, state(200)[2])
        save(store, 300, wait=True)
    assert sorted(os.listdir(tmp_path)) == ["200", "300"]
    open_store(tmp_path).close()
    assert capsys.readouterr().out == ""


@pytest.mark.prove
@pytest.mark.parametrize("trial", range(12))
def test_killed_at_any_time(tmp_path, trial):
    run("killed_at", tmp_path, 0.1 + 0.137 * trial, status=-9)
    latest = checkpoint_steps(tmp_path)[-1]
    with open_store(tmp_path) as store:
        same_bits(store.restore(*abstract()).params, state(latest)[0])
        save(store, latest + 1, wait=True)
        assert not [name for name in os.listdir(tmp_path) if not name.isdecimal()]


def test_a_disk_that_is_too_small_is_noticed_before_writing(tmp_path, monkeypatch):
    directory = tmp_path / "checkpoints"
    with open_store(directory) as store:
        record = save(store, 100, wait=True)
        before = sorted(os.listdir(directory))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 4096, 4096))
        message = one_line_error(
            lambda: save(store, 200), "not saving step 200", " 4096 bytes", "free some space and resume from step 100"
        )
        needed = int(message.split(": ")[1].split(" bytes")[0])
        assert record.state_bytes < needed < record.state_bytes * 1.1 + 2**21
        assert sorted(os.listdir(directory)) == before
        monkeypatch.undo()
        save(store, 200, wait=True)
        assert store.steps() == [100, 200]


def test_a_disk_that_is_too_small_is_noticed_before_the_first_step(tmp_path, monkeypatch):
    """Not by the first checkpoint, with which all that was trained until then would be lost."""
    params, ema, opt_state = state(3)
    with open_store(tmp_path / "checkpoints") as store:
        store.check_space(params, None, opt_state)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 4096, 4096))
        said = "does not fit into", " 4096 bytes", "free some space"
        one_line_error(lambda: store.check_space(params, ema, opt_state), *said)
        one_line_error(lambda: store.check_space(*abstract()), *said)
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_is_raised_by_the_next_save(tmp_path):
    out, err = run("refused_by_the_disk", tmp_path, "go on")
    lines = out.splitlines()
    assert lines[0] == "save returned"
    assert lines[1].startswith(f"next save raised: saving step 200 to {tmp_path} failed: {os.strerror(27)} while writ")
    assert lines[1].endswith(
        "the half-written files were removed; make room on the disk (or mend it) and resume from step 100"
    )
    assert lines[2:] == ["steps [100, 400]"]
    assert err == ""
    with open_store(tmp_path) as store:
        for step in (100, 400):
            same_bits(store.restore(*abstract(), step=step).params, state(step)[0])
    assert sorted(os.listdir(tmp_path)) == ["100", "400"]


def test_a_write_that_fails_ends_the_program_with_one_line(tmp_path):
    out, err = run("refused_by_the_disk", tmp_path, "stop", status=2)
    assert out == "save returned\n"
    assert err.startswith(f"error: saving step 200 to {tmp_path} failed: {os.strerror(27)} ")
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == ["100"]


def test_a_write_that_fails_ends_both_processes_of_a_run(tmp_path):
    for process in start_two("one_of_two_processes_refused_by_the_disk", tmp_path):
        _, err = finish(process, status=2)
        assert f"error: saving step 200 to {tmp_path} failed: {os.strerror(27)} while writing " in err
        assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["100"]


def test_a_directory_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    store = open_store(tmp_path / "file" / "checkpoints")
    one_line_error(lambda: save(store, 1), "saving step 1 to", "resume from the beginning")
    store.close()


def test_an_error_on_its_way_is_not_replaced_by_a_failed_save(tmp_path):
    out, err = run("fails_for_another_reason_while_the_disk_refuses", tmp_path, status=1)
    assert out.startswith(f"checkpoints: saving step 200 to {tmp_path} failed: {os.strerror(27)} ")
    assert out.count("\n") == 1
    assert err.endswith("ZeroDivisionError: the other reason\n")
    assert err.count("Traceback") == 1
    assert os.listdir(tmp_path) == ["100"]


# -- for pipelines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "item"), [("auto", 1), ("ema", 1), ("params", 0)])
def test_pipelines_read_one_item(checkpoints, which, item):
    for other in ("params", "ema", "opt_state"):
        if other != ("params", "ema")[item]:
            shutil.rmtree(checkpoints / "300" / other)
    params, step, used = load_checkpoint_params(checkpoints, abstract()[0], which)
    assert (step, used) == (300, ("params", "ema")[item])
    same_bits(params, state(300)[item])


def test_pipelines_take_trained_weights_where_there_is_no_average(tmp_path):
    tree = jax.tree.map(jnp.asarray, state(5)[0])
    with open_store(tmp_path) as store:
        store.save(5, params=tree, ema=None, opt_state=tree, data_position=0, config={})
    params, step, which = load_checkpoint_params(tmp_path, jax.eval_shape(lambda: tree))
    assert (step, which) == (5, "params")
    same_bits(params, tree)
    one_line_error(lambda: load_checkpoint_params(tmp_path, tree, "ema"), "saved without averaged weights", "'params'")


def test_pipelines_may_cast_but_not_reshape(checkpoints):
    asked = abstract_tree(state(0)[0], jnp.bfloat16)
    params, _, _ = load_checkpoint_params(checkpoints, asked, "params", step=200)
    want = jax.tree.map(lambda leaf, like: jnp.asarray(leaf).astype(like.dtype), state(200)[0], asked)
    same_bits(params, want)
    asked["table"] = jax.ShapeDtypeStruct((16,), jnp.float32)
    del asked["head"]
    one_line_error(
        lambda: load_checkpoint_params(checkpoints, asked, "params"),
        "2 differences: params/head/kernel float32[64,8] is in the checkpoint only; params/table is int32[16]",
        "config.json",
    )


def test_pipelines_errors(checkpoints):
    asked = abstract()[0]
    with pytest.raises(FileNotFoundError, match=str(checkpoints / "nowhere")):
        load_checkpoint_params(checkpoints / "nowhere", asked)
    with pytest.raises(UserError, match="which='best' is not one of 'ema', 'params', 'auto'"):
        load_checkpoint_params(checkpoints, asked, "best")
    one_line_error(
        lambda: load_checkpoint_params(checkpoints, asked, step=1), "no checkpoint of step 1", "100, 200, 300"
    )
    shutil.rmtree(checkpoints / "300" / "ema")
    one_line_error(lambda: load_checkpoint_params(checkpoints, asked), "ema is missing", "delete it and load step 200")
    empty = checkpoints.parent / "empty"
    empty.mkdir()
    one_line_error(lambda: load_checkpoint_params(empty, asked), f"no checkpoint in {empty}")


def test_the_library_does_not_need_the_trainer_to_read_weights(checkpoints):
    code = (
        "import sys, sana_jax.weights as w; assert 'orbax' not in sys.modules; assert 'train' not in sys.modules;"
        f"import jax, jax.numpy as jnp; w.load_checkpoint_params({str(checkpoints)!r}, "
        "{'blocks': {'attention': {'kernel': jax.ShapeDtypeStruct((2, 64, 64), jnp.float32)},"
        " 'scale': jax.ShapeDtypeStruct((2, 64), jnp.bfloat16)},"
        " 'head': {'kernel': jax.ShapeDtypeStruct((64, 8), jnp.float32)},"
        " 'table': jax.ShapeDtypeStruct((16,), jnp.int32)}); assert 'train' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- converted weights -------------------------------------------------------------------------------------------------


def test_converted_weights_round_trip(tmp_path):
    params = state(3)[0]
    directory = tmp_path / "model" / "transformer"
    written = save_params(directory, params)
    assert written == sum(
        entry["bytes"] for entry in json.loads((directory / "manifest.json").read_text())["files"].values()
    )
    (directory / "config.json").write_text("{}")
    same_bits(load_params(directory, abstract()[0]), params)
    assert os.listdir(tmp_path / "model") == ["transformer"]
    one_line_error(lambda: save_params(directory, params), f"{directory} exists already")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_params(tmp_path / "nowhere", params)
    one_line_error(lambda: load_params(directory, {"other": jnp.ones(1)}), "5 differences", "convert")
    flip_a_bit(max((f for f in directory.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size))
    one_line_error(lambda: load_params(directory, params), "are damaged: the contents of ocdbt.process_0/d/")


def test_converted_weights_are_not_written_where_they_cannot_be_read(tmp_path):
    """Through a link they can."""
    params, place = state(3)[0], tmp_path / "model [1]"
    with pytest.raises(UserError, match=r"model \[1\]/transformer is not allowed, since .* has \[ in its name"):
        save_params(place / "transformer", params)
    assert os.listdir(tmp_path) == []
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    save_params(tmp_path / "link" / "transformer", params)
    same_bits(load_params(place / "transformer", abstract()[0]), params)


def test_converted_weights_are_whole_or_absent(tmp_path, monkeypatch):
    params = state(3)[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 4096, 4096))
    one_line_error(lambda: save_params(tmp_path / "a" / "b", params), "4096 bytes", "free some space")
    monkeypatch.undo()
    _, err = run("converted_weights_refused_by_the_disk", tmp_path / "a", status=2)
    assert err.startswith(f"error: writing {tmp_path / 'a'} failed: {os.strerror(27)}")
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_errors_are_the_users():
    assert issubclass(CheckpointError, UserError)
