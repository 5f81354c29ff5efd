from __future__ import annotations

import json

import numpy as np
import pytest

from sana_jax import CheckpointError, UserError
from train.batch import Batch
from train.data import Loader
from train.data.loader import BatchOrder


class Numbers:
    """Sample i is the number i."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    @property
    def buckets(self):
        return {(1, 1, 1): range(self.count)}

    def batch(self, indices, choices) -> Batch:
        return Batch(np.asarray(indices), np.zeros((len(indices), 1, 1)), np.ones((len(indices), 1), int))


def loader(samples=10, seed=0, batch_size=4, rows=None) -> Loader:
    return Loader(Numbers(samples), seed=seed, batch_size=batch_size, rows=rows or (0, batch_size))


def take(source: Loader, batches: int) -> np.ndarray:
    return np.stack([next(source).latents for _ in range(batches)])


def test_each_epoch_has_each_sample_once_in_another_order():
    order = take(loader(samples=10, batch_size=4), 10).reshape(4, 10)  # batches run across the ends of epochs
    for epoch in order:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in order}) == 4


def test_the_order_is_a_function_of_the_seed():
    assert np.array_equal(take(loader(seed=1), 5), take(loader(seed=1), 5))
    assert not np.array_equal(take(loader(seed=1), 5), take(loader(seed=2), 5))
    take(loader(seed=2**32 - 1), 1)


def test_a_batch_may_be_larger_than_the_data():
    rows = take(loader(samples=3, batch_size=7), 3).ravel()
    assert np.bincount(rows).tolist() == [7, 7, 7]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_their_rows_of_one_sequence(processes):
    share = 4 // processes
    parts = [loader(rows=(share * p, share * (p + 1))) for p in range(processes)]
    assert np.array_equal(np.concatenate([take(part, 6) for part in parts], axis=1), take(loader(), 6))


@pytest.mark.parametrize("before", [0, 1, 5])
def test_a_position_restores_exactly_on_any_number_of_processes(before):
    whole = loader()
    for _ in range(before):
        next(whole)
    position = json.loads(json.dumps(whole.position()))
    expected = take(whole, 6)

    again = loader()
    take(again, 3)  # wherever it stood
    again.restore(position)
    assert np.array_equal(take(again, 6), expected)

    halves = [loader(rows=rows) for rows in ((0, 2), (2, 4))]
    for half in halves:
        half.restore(position)
    assert np.array_equal(np.concatenate([take(half, 6) for half in halves], axis=1), expected)
    assert halves[0].position() == halves[1].position() == whole.position() == again.position()


@pytest.mark.parametrize("other", [{"samples": 11}, {"seed": 1}, {"batch_size": 5}])
def test_a_position_in_another_sequence(other):
    with pytest.raises(CheckpointError, match=r"data position belongs to .*resume with the run's own data"):
        loader(**other).restore(loader().position())


@pytest.mark.parametrize("damaged", [{}, None, {"samples": 10, "seed": 0, "batch_size": 4}])
def test_a_damaged_position(damaged):
    with pytest.raises(CheckpointError, match="position"):
        loader().restore(damaged)


def test_no_data():
    with pytest.raises(UserError, match="0 samples, at least 1"):
        loader(samples=0)


# -- several buckets ---------------------------------------------------------------------------------------------------


def order_of(counts: tuple[int, ...], batch_size: int, seed: int = 0) -> tuple[BatchOrder, list[np.ndarray]]:
    """An order over buckets of so many samples, and their samples."""
    ends = np.cumsum(counts)
    buckets = [np.arange(end - count, end) for count, end in zip(counts, ends)]
    return BatchOrder({(1, 1, place): own for place, own in enumerate(buckets, 1)}, seed, batch_size), buckets


@pytest.mark.parametrize(
    ("counts", "batch_size"), [((11, 12), 8), ((8, 11, 12, 20), 8), ((2, 40), 16), ((1, 2, 3), 4), ((300, 7, 45), 3)]
)
def test_every_sample_is_seen_as_often_as_any_other(counts, batch_size):
    order, buckets = order_of(counts, batch_size)
    total, batches = sum(counts), 2000
    plans = [order.plan(number).indices for number in range(batches)]
    seen = np.bincount(np.concatenate(plans), minlength=total)
    turns = np.zeros(len(counts))
    most = sum(-(-count // batch_size) for count in counts)  # turns of a round
    for number, plan in enumerate(plans, 1):
        (bucket,) = (place for place, own in enumerate(buckets) if plan[0] in own)
        assert set(plan) <= set(buckets[bucket])
        turns[bucket] += 1
        assert np.abs(turns - number * np.asarray(counts) / total).max() <= most
    for own in buckets:
        assert np.ptp(seen[own]) <= 1
        assert seen[own].mean() * total / (batches * batch_size) == pytest.approx(1, abs=0.03)


def test_any_batch_is_found_without_those_before_it():
    order, _ = order_of((8, 11, 12, 20), 8)
    turns = [order.turn(number) for number in range(400)]
    for shape in order.shapes:
        assert [turn for own, turn in turns if own == shape] == list(range(sum(own == shape for own, _ in turns)))
    again, _ = order_of((8, 11, 12, 20), 8)
    assert [again.turn(number) for number in reversed(range(400))] == turns[::-1]
    shape, turn = order.turn(10**9)
    assert (shape, turn) == again.turn(10**9)
    share = dict(zip(order.shapes, (8, 11, 12, 20)))[shape] / 51
    assert turn == pytest.approx(10**9 * share, abs=10)
