"""``base_model.json``: what a training run's directory says of the model that it started from.

Such a directory has the run's own transformer configuration, sampler and defaults; text encoder and autoencoder are the
base model's, and so is the transformer where the run has trained something beside it.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from sana_jax.errors import CheckpointError, UserError
from sana_jax.files import read_json, write_json

NAME = "base_model.json"
# What a run's checkpoints hold.
KINDS = ("whole", "lora", "controlnet", "sprint", "chunk_causal", "world_chunk_causal", "self_forcing")


@dataclasses.dataclass(frozen=True)
class BaseModelFile:
    """What the file holds.

    Attributes:
        kind: what the run has trained: the ``whole`` transformer, or something beside it, one of ``KINDS``.
        model: the base model, as the run's configuration names it.
        path: the same from anywhere: an absolute path, or a name on the Hub.
        weights_id: of the base model's transformer.
        settings: what must be known to use the trained part: rank and alpha of a LoRA, ...
        variant: of the base model's weight files that the run was given; files of earlier versions do not say.
    """

    kind: str
    model: str
    path: str
    weights_id: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variant: str | None = None

    def write(self, directory: pathlib.Path) -> None:
        """Writes the file."""
        write_json(directory / NAME, dataclasses.asdict(self))

    @classmethod
    def read(cls, directory: pathlib.Path) -> BaseModelFile | None:
        """Reads the file; None where the directory has none.

        Raises:
            UserError: the file is damaged.
        """
        path = directory / NAME
        if not path.is_file():
            return None
        values = read_json(path)
        fields = [field.name for field in dataclasses.fields(cls)]
        complete = set(values) | {"variant"} == set(fields) and isinstance(values.get("variant"), str | None)
        if not complete or values["kind"] not in KINDS or not isinstance(values["settings"], dict):
            raise UserError(
                f"{path} has {', '.join(sorted(values)) or 'nothing'}, kind {values.get('kind')!r}; it must have "
                f"{', '.join(fields)} and a kind of {', '.join(KINDS)}: mend it, or train again"
            )
        return cls(**values)

    def locate(self, directory: pathlib.Path) -> str:
        """The base model's path or name on the Hub.

        Raises:
            FileNotFoundError: it is in none of the places where it was or could be.
        """
        beside = directory.parent / pathlib.Path(self.path).name
        for place in (self.path, self.model, os.fspath(beside)):
            if pathlib.Path(place).is_dir():
                return place
        if os.path.isabs(self.path):
            raise FileNotFoundError(
                f"{directory} was trained beside the base model {self.model}, which is neither at {self.path} nor at "
                f"{beside}: copy it to one of them, or mend path in {directory / NAME}"
            )
        return self.path

    def check(self, found: str, directory: pathlib.Path) -> None:
        """Raises ``CheckpointError`` if the base model's weights are not those that the run started from."""
        if found != self.weights_id:
            raise CheckpointError(
                f"{directory} was trained beside {self.model} with weights {self.weights_id}, and there are weights "
                f"{found} now; put the old ones back, or train again"
            )
