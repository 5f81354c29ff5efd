"""Where the fake score of self-forcing begins: as the base model, or as that of an earlier run of self-forcing."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from configs.schema import RunConfig
from kernels.typing import PyTree
from sana_jax.errors import UserError
from sana_jax.weights import checkpoint_steps, load_checkpoint_params
from sana_jax.weights.checkpoints import checkpoint_structure
from train.run_directory import read_config

FAKE = "fake"


class FakeScoreStart(NamedTuple):
    """A run of self-forcing whose fake score another run goes on from."""

    directory: Path

    def weights(self, abstract: PyTree) -> PyTree:
        """The fake score's parameters as ``abstract`` lays them out, of the newest checkpoint.

        Raises:
            CheckpointError: they are damaged, or do not fit.
        """
        checkpoints = self.directory / "checkpoints"
        structure = checkpoint_structure(checkpoints, which="params")
        params, _, _ = load_checkpoint_params(checkpoints, {**structure, FAKE: abstract}, which="params")
        return jax.tree.map(jnp.copy, params[FAKE])  # the step's buffers are donated


def open_fake_score_start(config: RunConfig) -> FakeScoreStart | None:
    """The run that ``self_forcing.fake_score`` names; None where there is none. Weights are read later.

    Raises:
        FileNotFoundError: there is no run.
        UserError: it is no run of self-forcing, has another network, or no checkpoint yet.
    """
    name = None if config.self_forcing is None else config.self_forcing.fake_score
    if name is None:
        return None
    directory = Path(name).expanduser()
    found = read_config(directory)
    if found.self_forcing is None:
        raise UserError(
            f"--self-forcing.fake-score {name} is no run of self-forcing, which alone has a fake score; name one, or "
            "leave the option out to begin as the base model"
        )
    if found.transformer != config.transformer:
        raise UserError(
            f"--self-forcing.fake-score {name} has another network than --model {config.model}; both must be of one "
            "shape"
        )
    if not checkpoint_steps(directory / "checkpoints"):
        raise UserError(f"--self-forcing.fake-score {name} has no checkpoint yet; train it first")
    return FakeScoreStart(directory)
