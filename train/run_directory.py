"""A run's directory: what is in it, whether a run may use it, and what makes it a model directory.

::

    config.json          the run's configuration
    metrics.jsonl        a row of numbers every few steps
    data.jsonl           the samples that it began with and goes on with (class.jsonl, pictures.jsonl: further ones;
                         prompts.jsonl: prompts without videos)
    samples/             previews
    checkpoints/<step>/  training states
    tensorboard/         events
    model_index.json ... what ``python -m sana_jax.generate --model`` reads
    pytorch_lora_weights.safetensors, README.md   of a LoRA run: the newest LoRA as diffusers loads it, and its card
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from configs.changes import COMPUTED_OTHERWISE, CONDITIONS, all_differences, differing_fields, with_absolute_places
from configs.longsana_data import PromptsDataConfig
from configs.moving_camera import MovingCameraDataConfig
from configs.schema import RunConfig
from configs.serialization import from_dict, to_dict
from sana_jax.condition_tokens_files import TOKENS
from sana_jax.diffusion.samplers import Sampler, make_sampler
from sana_jax.errors import CheckpointError, UserError
from sana_jax.files import check_can_write, write_json
from sana_jax.pipelines.base_model_file import BaseModelFile
from sana_jax.pipelines.model_directory import CAMERA_DEFAULTS, SamplingDefaults, check_fit, write_model_directory
from sana_jax.weights import check_folder_name, checkpoint_steps, damaged_checkpoint, find_damage
from train.assembly import RunParts
from train.base_model import BaseModel, open_encoders
from train.data.conditions import Siglip, declared_conditions
from train.data.pinned import CLASS, DATA, PICTURES, PROMPT_LIST, write_pins
from train.model_card import NAME as CARD_NAME

CONFIG_NAME = "config.json"
# What else a run puts into its directory. None of it may be there before a run is.
NAMES = (
    "metrics.jsonl",
    "samples",
    "checkpoints",
    "tensorboard",
    "model_index.json",
    "base_model.json",
    DATA,
    CLASS,
    PICTURES,
    "pytorch_lora_weights.safetensors",
    "condition_tokens.safetensors",
    "condition_tokens.json",
    "transformer",
    "scheduler",
    "text_encoder",
    "vae",
)

# The list of samples (``train.data.pinned``) that says whether what an option names is what it was.
_LISTS = {
    **dict.fromkeys(("data.path", "data.cache"), DATA),
    **dict.fromkeys(("data.joint_pictures", "data.joint_cache"), PICTURES),
    "prior.path": CLASS,
}


def read_config(run_dir: Path) -> RunConfig:
    """The configuration of an existing run.

    Raises:
        FileNotFoundError: there is no run in that directory.
        UserError: its file is damaged or of another version.
    """
    path = run_dir / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, so {run_dir} holds no run; name a directory that python -m train.main has written"
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); mend it or start a new run") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not a JSON object; mend it or start a new run")
    return from_dict(RunConfig, values, str(path))


def located(config: RunConfig, run_dir: Path) -> RunConfig:
    """The configuration of an existing run with its model where it is now: it may have moved, with the run or without.

    Raises:
        UserError: ``base_model.json`` is damaged.
    """
    option = "encoders" if config.model is None else "model"
    name, trained_from = getattr(config, option), BaseModelFile.read(run_dir)
    if name is None or trained_from is None or Path(name).exists():
        return config
    try:
        return dataclasses.replace(config, **{option: trained_from.locate(run_dir)})
    except FileNotFoundError:  # which opening it says, unless the command line names another place
        return config


def computed_otherwise(config: RunConfig) -> str | None:
    """A line about what a run computes in another order than it began with; None where there is nothing."""
    if not has_checkpoint(Path(config.run_dir)):
        return None
    changed = all_differences(read_config(Path(config.run_dir)), config)
    shown = [
        f"--{name.replace('_', '-')} {new} instead of {old}"
        for name, (old, new) in changed.items()
        if name in COMPUTED_OTHERWISE
    ]
    if not shown:
        return None
    return f"{', '.join(shown)}: the same steps in another order, which changes their last digits"


def has_checkpoint(run_dir: Path) -> bool:
    """Whether there is a finished checkpoint, from which the run would go on."""
    return bool(checkpoint_steps(run_dir / "checkpoints"))


def require_checkpoint(run_dir: Path) -> None:
    """Raises ``CheckpointError`` unless the run has a checkpoint to resume from."""
    if not has_checkpoint(run_dir):
        raise CheckpointError(
            f"no checkpoint in {run_dir / 'checkpoints'}: nothing to resume from; start the run from the beginning "
            f"with --run-dir {run_dir}, or name another run"
        )


def claim(config: RunConfig, base: BaseModel | None = None) -> bool:
    """Makes sure that the directory may hold this run; returns whether it holds its beginning already. Writes nothing.

    Raises:
        UserError: it cannot be written to, or holds a run of another configuration, or a model that is not a run.
        CheckpointError: its newest checkpoint is damaged, or it trains beside a model whose weights have changed.
    """
    check_writable(config)
    run_dir = Path(config.run_dir)
    if not (run_dir / CONFIG_NAME).exists():
        own = {CARD_NAME: config.lora is not None, PROMPT_LIST: isinstance(config.data, PromptsDataConfig)}
        names = (*NAMES, *(name for name, is_written in own.items() if is_written))
        if found := [name for name in names if (run_dir / name).exists()]:
            raise UserError(
                f"--run-dir {run_dir} holds {', '.join(found)} but no {CONFIG_NAME}, so it is not a run, and training "
                "would overwrite it; name a directory that is new or holds this run"
            )
        return False
    trained_from = BaseModelFile.read(run_dir)
    if not has_checkpoint(run_dir):  # it begins anew, whatever it was to be
        return True
    differences = differing_fields(read_config(run_dir), config)
    differences = {name: values for name, values in differences.items() if not _has_moved(name, config, base)}
    if differences:
        shown = "; ".join(f"{name} {old!r} there, {new!r} here" for name, (old, new) in list(differences.items())[:3])
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise UserError(
            f"{run_dir} holds a run of another configuration: {shown}{more}; name another --run-dir, or continue that "
            f"run as it is with --resume {run_dir}"
        )
    _check_newest_checkpoint(run_dir / "checkpoints")
    if trained_from is not None and trained_from.kind != "whole":  # what is trained whole began there and left it
        trained_from.check(base.weights_id, run_dir)
    return True


def _has_moved(name: str, config: RunConfig, base: BaseModel | None) -> bool:
    """Whether an option that differs names the same thing in another place: a model by its weights; data by the list of
    samples that the run began with, which are looked for there."""
    run_dir = Path(config.run_dir)
    if name in _LISTS:
        return (run_dir / _LISTS[name]).is_file()
    trained_from = BaseModelFile.read(run_dir)
    if name == CONDITIONS and trained_from is not None:
        return _image_encoders_have_moved(read_config(run_dir).data.conditions, config.data.conditions, trained_from)
    if trained_from is None or name not in ("model", "encoders") or getattr(config, name) is None:
        return False
    found = base if name == "model" else open_encoders(config)
    return found is not None and found.weights_id == trained_from.weights_id


def _image_encoders_have_moved(before: Sequence[str], now: Sequence[str], trained_from: BaseModelFile) -> bool:
    """Whether conditions differ in nothing but the directories of image encoders, which hold those of the training."""
    known = trained_from.settings.get(TOKENS, {}).get("image_encoders", {})
    old, new = declared_conditions(before), declared_conditions(now)
    if [one._replace(argument="") for one in old] != [one._replace(argument="") for one in new]:
        return False
    moved = [there for here, there in zip(old, new) if here.argument != there.argument]
    return all(Siglip.open(one.name, one.argument).id == known.get(one.name, {}).get("id") for one in moved)


@contextlib.contextmanager
def hold(config: RunConfig) -> Iterator[None]:
    """Keeps other runs out of the directory, which is made, and removes what a killed one left half-written.

    The system lets go of it where the process ends. Process 0 only.

    Raises:
        UserError: another process trains there, or it can't be made.
    """
    if jax.process_index() != 0:
        yield
        return
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        directory = os.open(run_dir, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is training in {run_dir}; wait until it has ended, or name another --run-dir"
            ) from error
        except OSError as error:  # a file system without locks
            print(
                f"warning: {run_dir} can't be locked ({error.strerror}), so that nothing keeps a second run out of it: "
                "start no other one there",
                flush=True,
            )
        for folder in (run_dir, *(run_dir / name for name in NAMES if name != "checkpoints")):
            for path in folder.glob(".*.tmp"):
                path.unlink(missing_ok=True)
        yield
    finally:
        os.close(directory)


def _unwritable(run_dir: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to --run-dir {run_dir} ({error.strerror}); name a directory that can be written to")


def _check_newest_checkpoint(checkpoints: Path) -> None:
    """Raises ``CheckpointError`` for missing or shortened files before anything is compiled; restoring reads all."""
    steps = checkpoint_steps(checkpoints)
    if steps and (problem := find_damage(checkpoints / str(steps[-1]), checksums=False)):
        raise damaged_checkpoint(checkpoints, steps[-1], problem, "resume from")


def check_writable(config: RunConfig) -> None:
    """Asked before minutes of preparation; the folder itself is made when there is something to put into it.

    Raises:
        UserError: the run's directory is a file, lies in the data, has a name that checkpoints cannot be below, or
            cannot be written to.
    """
    run_dir = Path(config.run_dir)
    if not config.run_dir or (run_dir.exists() and not run_dir.is_dir()):
        kind = "is a file" if config.run_dir else "is empty"
        raise UserError(f"--run-dir {config.run_dir!r} {kind}; name a directory that is new or holds this run")
    folder = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not folder.is_dir():
        raise UserError(f"--run-dir {run_dir} lies in {folder}, which is a file; name a place for a directory")
    for option, data in _folders_of_data(config):
        if run_dir.resolve().is_relative_to(data.resolve()):
            raise UserError(
                f"--run-dir {run_dir} lies in {option} {data}, where the run's own pictures would be taken for data; "
                "name a place outside of it"
            )
    check_folder_name(run_dir, f"--run-dir {run_dir}")
    check_can_write(f"{run_dir}/", f"to --run-dir {run_dir}")


def _folders_of_data(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """Options that name folders that are looked through, with the folders."""
    joint, prior = getattr(config.data, "joint_pictures", None), config.prior
    named = {
        "--data.path": getattr(config.data, "path", None),
        "--data.joint-pictures": joint,
        "--prior.path": None if prior is None else prior.path,
    }
    yield from ((option, Path(place)) for option, place in named.items() if place is not None and Path(place).is_dir())


def run_sampler(config: RunConfig) -> Sampler:
    """The sampler of previews, which is also the run's default for sampling."""
    if config.sprint is not None:
        return make_sampler(config.preview.sampler, sigma_data=config.sprint.sigma_data)
    if config.few_steps is not None:
        return config.few_steps.sampler
    if config.preview.sampler == "scm":  # of a distilled base model
        return make_sampler("scm")
    return make_sampler(config.preview.sampler, flow_shift=config.flow.sampling_shift)


def check_parts(parts: RunParts) -> None:
    """Raises ``UserError`` if the network, the data's encoders and the sampler do not make a model."""
    check_fit(parts.config.transformer, parts.text_encoder, parts.autoencoder)
    run_sampler(parts.config)


def _forget_another_beginning(config: RunConfig) -> None:
    """Removes what a run of another configuration has left that ended before its first checkpoint."""
    run_dir = Path(config.run_dir)
    if has_checkpoint(run_dir) or not (run_dir / CONFIG_NAME).exists():
        return
    if differing_fields(read_config(run_dir), config):
        shutil.rmtree(run_dir / "samples", ignore_errors=True)
        for name in ("metrics.jsonl", "base_model.json"):
            (run_dir / name).unlink(missing_ok=True)


def _camera(parts: RunParts) -> dict[str, float | None]:
    """The lens and the speeds of keys of made clips, also of those that the base model was trained on."""
    made, base = parts.config.data, parts.base
    if not isinstance(made, MovingCameraDataConfig):
        made = None if base is None else base.parts.defaults
    return {name: getattr(made, name, None) for name in CAMERA_DEFAULTS}


def write(parts: RunParts) -> None:
    """Writes the configuration and what makes the directory a model directory. Process 0 only.

    Raises:
        UserError: the directory cannot be written to, or the parts do not fit one another.
    """
    if jax.process_index() != 0:
        return
    config, base = parts.config, parts.base
    run_dir = Path(config.run_dir)
    height, width = parts.size
    try:
        _forget_another_beginning(config)
        # first of all, since it says whose directory this is
        write_json(run_dir / CONFIG_NAME, to_dict(with_absolute_places(config)))
        write_model_directory(
            run_dir,
            transformer_config=config.transformer,
            sampler=run_sampler(config),
            text_encoder=parts.text_encoder,
            autoencoder=parts.autoencoder,
            defaults=SamplingDefaults(
                guidance_scale=config.preview.guidance_scale,
                num_inference_steps=config.preview.num_inference_steps,
                height=height,
                width=width,
                license=None if base is None else base.parts.defaults.license,
                frames=parts.frames,
                fps=parts.fps,
                **_camera(parts),
            ),
            pipeline=parts.pipeline,
            trained_from=parts.trained_from,
        )
        write_pins(parts.dataset, run_dir)
    except OSError as error:
        raise _unwritable(run_dir, error) from error
