"""Which directories a run may use: its own card's name, runs without a checkpoint, and models that have moved."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import types

import pytest

from configs import load_preset
from configs.changes import with_absolute_places
from configs.serialization import to_dict
from sana_jax.errors import CheckpointError, UserError
from sana_jax.generate import GenerateConfig
from sana_jax.pipelines.base_model_file import BaseModelFile
from train import run_directory
from train.data.cache import CacheIdentity
from train.data.cache_plan import cache_directory
from train.evaluation.drawing import as_trained
from train.run_directory import check_writable, claim, computed_otherwise, hold, located


def run_in(directory, preset: str = "lora", **changes):
    return dataclasses.replace(load_preset(preset), run_dir=str(directory), model="somewhere/base", **changes)


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """The configuration of a run that is there, beside a base model; its checkpoint is not looked into."""
    config = run_in(tmp_path / "run", model_variant="bf16")
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(with_absolute_places(config))))
    BaseModelFile("lora", config.model, "/gone/base", "id").write(tmp_path / "run")
    monkeypatch.setattr(run_directory, "_check_newest_checkpoint", lambda checkpoints: None)
    return config


def test_a_directory_without_locks_is_said(tmp_path, monkeypatch, capsys):
    """Then nothing keeps two runs from the same files."""

    def flock(directory, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with hold(run_in(tmp_path / "run")):
        assert capsys.readouterr().out == ""
        with pytest.raises(UserError, match="another process is training in"), hold(run_in(tmp_path / "run")):
            pass
    monkeypatch.setattr(run_directory.fcntl, "flock", flock)
    with hold(run_in(tmp_path / "run")):
        out = capsys.readouterr().out
    assert out.startswith(f"warning: {tmp_path / 'run'} can't be locked (No locks available)")
    assert out.count("\n") == 1


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_permissions_alone_do_not_tell_whether_a_directory_can_be_written():
    """Those of an administrator allow to write in /proc, which takes no files."""
    with pytest.raises(UserError, match=r"cannot write to --run-dir /proc/run \(.*that can be written to"):
        check_writable(run_in("/proc/run"))


@pytest.mark.parametrize("name", ["lr[1e-4]", "runs [2]/one", "which?", "all*"])
def test_a_name_that_checkpoints_cannot_be_below_is_refused(name, tmp_path):
    """Orbax takes the path for a pattern, and writes checkpoints without the index that they are read by."""
    with pytest.raises(UserError, match=r"--run-dir .* is not allowed, since .* name a directory without such"):
        check_writable(run_in(tmp_path / name))
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / name)
    check_writable(run_in(tmp_path / "link"))


def test_a_run_does_not_write_into_its_data(tmp_path):
    """Its previews and its cache's check picture would be trained on the next time."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for place in (pictures, pictures / "runs" / "one", tmp_path / "elsewhere" / ".." / "pictures" / "run"):
        run = run_in(place)
        with pytest.raises(UserError, match=r"--run-dir .* lies in --data.path .*; name a place outside of it"):
            check_writable(dataclasses.replace(run, data=dataclasses.replace(run.data, path=str(pictures))))
    beside = run_in(tmp_path / "pictures_run")
    data = dataclasses.replace(beside.data, path=str(pictures))
    check_writable(dataclasses.replace(beside, data=data))
    inside = dataclasses.replace(data, cache=str(pictures / "cache"))
    with pytest.raises(UserError, match=r"--data.cache .* lies in --data.path .*; name a place outside of it"):
        cache_directory(dataclasses.replace(beside, data=inside), CacheIdentity({}))


def base(weights_id: str):
    return types.SimpleNamespace(weights_id=weights_id)


def test_a_readme_of_the_users_is_not_taken_for_a_card(tmp_path):
    (tmp_path / "README.md").write_text("my own notes")
    with pytest.raises(UserError, match=r"holds README.md but no config.json"):
        claim(run_in(tmp_path))
    assert not claim(run_in(tmp_path, "finetune"))  # which writes none


def test_a_list_of_prompts_of_the_users_is_not_taken_for_the_runs(tmp_path):
    """It would be read as the prompts that the run began with, whatever --data.path names."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "my own"}\n')
    with pytest.raises(UserError, match=r"holds prompts.jsonl but no config.json"):
        claim(run_in(tmp_path, "longsana_self_forcing"))
    assert not claim(run_in(tmp_path, "finetune"))  # which writes none


def test_a_model_may_move_but_not_change(begun):
    elsewhere = dataclasses.replace(begun, model="/new/place/base")
    assert claim(elsewhere, base("id"))
    with pytest.raises(UserError, match=r"another configuration: model 'somewhere/base' there, '/new/place/base' here"):
        claim(elsewhere, base("other"))
    with pytest.raises(CheckpointError, match="there are weights other now"):
        claim(begun, base("other"))


def test_data_may_move_where_its_samples_are_known(begun, tmp_path):
    elsewhere = dataclasses.replace(begun, data=dataclasses.replace(begun.data, path="/new", cache="/cache"))
    with pytest.raises(UserError, match=r"another configuration: data.path None there, '/new' here; data.cache"):
        claim(elsewhere, base("id"))
    (tmp_path / "run" / "data.jsonl").touch()
    assert claim(elsewhere, base("id"))


def test_before_the_first_checkpoint_anything_may_change(begun, tmp_path):
    other = dataclasses.replace(begun, seed=7)
    with pytest.raises(UserError, match="another configuration: seed 0 there, 7 here"):
        claim(other, base("id"))
    (tmp_path / "run" / "checkpoints" / "5").rmdir()
    for name in ("samples", "transformer"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "file").touch()
    assert claim(other, base("other"))
    run_directory._forget_another_beginning(begun)
    assert (tmp_path / "run" / "samples" / "file").exists()
    run_directory._forget_another_beginning(other)
    assert not (tmp_path / "run" / "samples").exists()
    assert not (tmp_path / "run" / "base_model.json").exists()
    assert (tmp_path / "run" / "transformer" / "file").exists()


def test_what_is_computed_otherwise_is_said(begun):
    assert computed_otherwise(begun) is None
    relieved = dataclasses.replace(begun, accumulation=4)
    assert claim(relieved, base("id"))
    assert computed_otherwise(relieved).startswith("--accumulation 4 instead of 1: the same steps in another order")


def test_a_model_is_looked_for_beside_its_run(begun, tmp_path):
    assert located(begun, tmp_path / "run").model == "somewhere/base"  # which opening it says is missing
    (tmp_path / "base").mkdir()
    assert located(begun, tmp_path / "run").model == str(tmp_path / "base")


def test_a_run_that_saturates_is_measured_so(begun, tmp_path):
    request = GenerateConfig(model=str(tmp_path / "run"), prompt=("a dog",), output="picture.png")
    assert as_trained(request) == request
    compute = dataclasses.replace(begun.compute, emulate_fp16_saturation=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(dataclasses.replace(begun, compute=compute))))
    assert as_trained(request).emulate_fp16_saturation
