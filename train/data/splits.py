"""Training and validation pictures: by group, so that nothing of what is measured was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sana_jax.errors import UserError

if TYPE_CHECKING:
    from train.data.source import Record


def split(records: Sequence[Record], share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices of the training records and of the validation records.

    A group's side depends on its name and the seed alone, so that it stays where it is when data is added. Where a
    share of few groups would leave one side empty, that side gets the group that is nearest to it.

    Args:
        records: records; those without a group are groups by themselves.
        share: expected share of groups for validation, 0 up to, not including, 1.
        seed: of the choice.

    Raises:
        UserError: a share that is not allowed, or a share above 0 of fewer than two groups.
    """
    if not 0 <= share < 1:
        raise UserError(f"validation share {share} is not allowed; choose 0 up to, not including, 1")
    everything = list(range(len(records)))
    if share == 0 or not records:
        return everything, []
    names = [record.key if record.group is None else f"group {record.group}" for record in records]
    places = {name: _place(name, seed) for name in names}
    if len(places) < 2:
        raise UserError(
            f"--data.validation-share {share}: all {len(records)} pictures belong to one group, and a group is never "
            "divided; choose 0, or another --data.group-column"
        )
    held_out = {name for name, place in places.items() if place < share}
    if not held_out:
        held_out = {min(places, key=places.__getitem__)}
    elif len(held_out) == len(places):
        held_out.remove(max(places, key=places.__getitem__))
    return (
        [index for index in everything if names[index] not in held_out],
        [index for index in everything if names[index] in held_out],
    )


def _place(name: str, seed: int) -> float:
    """A number in [0, 1) that is the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
