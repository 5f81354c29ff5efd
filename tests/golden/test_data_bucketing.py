"""Aspect-ratio buckets, resizing, batches and the choice of captions, against recorded vectors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sana_jax.pipelines.resolution import Bin, nearest_bin
from tests.golden.golden_files import assert_golden_exact, load_golden
from train.data.buckets import Bucket, assign_buckets
from train.data.captions import CaptionRule, caption_weights, choose_caption
from train.data.decoding import covering_size, crop_offset
from train.data.source import Caption

GOLDEN = load_golden("data_bucketing")
CLIP_CASES = GOLDEN.hparams["caption_clip_cases"]
FIXED_CASES = GOLDEN.hparams["caption_fixed_cases"]
# The order in which kinds of caption are drawn where their proportions are fixed.
ORDER = max((case["info"] for case in CLIP_CASES), key=len)


def recorded_table(name: str) -> tuple[Bin, ...]:
    return tuple(Bin(float(ratio), int(h), int(w)) for ratio, (h, w) in GOLDEN.hparams["tables"][name].items())


def recorded_sizes() -> list[tuple[int, int]]:
    return [(int(height), int(width)) for height, width in GOLDEN["in/hw"]]


@pytest.mark.parametrize("name", GOLDEN.children("out/assign/"))
def test_assign(name):
    table, sizes = recorded_table(name), recorded_sizes()
    rows = []
    for size in sizes:
        chosen = nearest_bin(*size, table)
        scaled = covering_size(size, chosen.height, chosen.width)
        offset = crop_offset(scaled, chosen.height, chosen.width, "center")
        rows.append([table.index(chosen), chosen.height, chosen.width, *scaled, *offset])
    assert_golden_exact(rows, GOLDEN[f"out/assign/{name}"], name)
    plan = assign_buckets(sizes, table, minimum=1)
    targets = [plan.buckets[index] for index in plan.bucket_of]
    assert targets == [Bucket(*row[1:3]) for row in GOLDEN[f"out/assign/{name}"].tolist()]


@pytest.mark.parametrize("name", GOLDEN.children("out/batches/"))
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches(name, drop_last):
    """The recorded loader hands batches out as they fill up, so they follow from the sizes alone."""
    buckets = assign_buckets(recorded_sizes(), recorded_table(name), minimum=1).bucket_of.tolist()
    prefix = f"out/batches/{name}/drop_last{int(drop_last)}"
    arrivals = 200
    if not drop_last:
        arrivals = len(GOLDEN[f"{prefix}/indices"])
    batches = batches_in_order(
        [buckets[position % len(buckets)] for position in range(arrivals)],
        GOLDEN.hparams["batch_size"],
        drop_last=drop_last,
    )
    assert_golden_exact([len(batch) for batch in batches], GOLDEN[f"{prefix}/sizes"])
    assert_golden_exact(np.concatenate(batches), GOLDEN[f"{prefix}/indices"])


def batches_in_order(buckets: list[int], batch_size: int, *, drop_last: bool) -> list[list[int]]:
    """Positions of samples in batches of one size each; at the end come those of the sizes that are not full."""
    waiting: dict[int, list[int]] = {}
    batches: list[list[int]] = []
    for position, bucket in enumerate(buckets):
        waiting.setdefault(bucket, []).append(position)
        if len(waiting[bucket]) == batch_size:
            batches.append(waiting.pop(bucket))
    return batches if drop_last else batches + [waiting[bucket] for bucket in sorted(waiting)]


def possible_orders(case) -> list[list[Caption]]:
    """The captions of a case. Its score files are recorded sorted by name: which order was drawn in is not known."""
    files = [[item for item in scores.items() if item[0] in case["info"]] for scores in case["score_files"]]
    orders = itertools.product(*(itertools.permutations(file) for file in files))
    listed = [[Caption(f"by {kind}", kind, score) for file in order for kind, score in file] for order in orders]
    scored = {caption.kind for caption in listed[0]}
    rest = [Caption(f"by {kind}", kind) for kind in case["info"] if kind not in scored]
    return [captions + rest for captions in listed]


@pytest.mark.parametrize("case", CLIP_CASES, ids=range(len(CLIP_CASES)))
def test_caption_by_clip_score(case):
    rule = CaptionRule("clipscore", case["clip_thr"], case["temperature"])
    orders = possible_orders(case)
    if case["label"] not in case["info"]:
        # the recording names the default caption where nothing has a score; a sample without it gives its first
        assert (case["label"], case["score"]) == ("prompt", 0)
        assert choose_caption(orders[0], rule, case["u"]).kind == case["info"][0]
        return
    drawn = [choose_caption(captions, rule, case["u"]) for captions in orders]
    assert case["label"] in {caption.kind for caption in drawn}
    weights = caption_weights(orders[0], rule)
    candidates = [caption for caption, weight in zip(orders[0], weights) if weight > 0]
    first = next(caption.score for caption in candidates if caption.kind == case["label"])
    assert (first or 0.0) == case["score"]
    if case["probabilities"] is None:
        assert {caption.kind for caption in drawn} == {case["label"]}
        assert sorted(weights)[-2:] in ([0.0, 1.0], [1.0])
    else:
        # of a kind that comes twice the recording holds the last alone
        shares = {caption.kind: weight / sum(weights) for caption, weight in zip(orders[0], weights) if weight > 0}
        assert shares == pytest.approx(case["probabilities"], rel=1e-9)


@pytest.mark.parametrize("case", FIXED_CASES, ids=range(len(FIXED_CASES)))
def test_caption_by_proportion(case):
    captions = [Caption(f"by {label}", label) for label in sorted(case["proportions"], key=ORDER.index)]
    rule = CaptionRule("proportion", weights=case["proportions"])
    assert choose_caption(captions, rule, case["u"]).kind == case["label"]
