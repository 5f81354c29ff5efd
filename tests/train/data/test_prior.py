"""Prior preservation: as many samples of the class as of the subject, in its shapes; drawn once, by caption."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from configs.prior import PriorConfig
from sana_jax.errors import UserError
from sana_jax.pipelines.resolution import Bin
from tests.train.data.cache_cases import gray_model, gray_pictures, prepared, run_config
from train import prior_data
from train.base_model import BaseModel
from train.batch import Batch
from train.data import CachedData, cache_plan
from train.data.buckets import Bucket, spread_over
from train.data.prior import LOSS_WEIGHT, WithPrior, draw_prior_pictures

TALL, SQUARE = (16, 8, 1), (8, 8, 1)


class Numbers:
    """Sample i has latents of the number i, negative for a class."""

    directory = "cache"

    def __init__(self, sign: int, **counts: int):
        ends = np.cumsum(list(counts.values()))
        shapes = {"tall": TALL, "square": SQUARE}
        self.buckets = {
            shapes[name]: np.arange(end - count, end) for (name, count), end in zip(counts.items(), ends) if count
        }
        self.sign, self.count = sign, int(ends[-1])

    def __len__(self) -> int:
        return self.count

    def batch(self, indices, choices) -> Batch:
        numbers = self.sign * (np.asarray(indices) + 1)
        return Batch(numbers[:, None], np.zeros((len(indices), 1, 1)), np.ones((len(indices), 1), int))


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_half_of_the_samples_are_of_the_subject_whatever_their_shapes(batch_size):
    """Before, a shape of the class alone kept its own share: 5 of 105 samples were of the subject."""
    dataset = WithPrior(Numbers(1, tall=5, square=2), Numbers(-1, square=60, tall=40), weight=0.5)
    assert set(dataset.buckets) == {TALL, SQUARE}
    order, batches = dataset.order(0, batch_size), 1400
    plans = [order.plan(number).indices for number in range(batches)]
    for first, second in zip(plans[::2], plans[1::2]):
        assert (np.concatenate([first, second]) < 7).sum() == batch_size
        assert len({shape for shape, own in dataset.buckets.items() if np.isin([*first, *second], own).any()}) == 1
        assert abs((first < 7).sum() - batch_size / 2) <= 0.5
    seen = np.bincount(np.concatenate(plans), minlength=107) / (batches * batch_size / 2)
    np.testing.assert_allclose(seen[:7] * 7, 1, atol=0.02)
    np.testing.assert_allclose([seen[7:67].sum(), seen[67:].sum()], [2 / 7, 5 / 7], atol=0.01)
    assert (seen > 0).all()
    batch = dataset.batch(plans[0])
    of_class = plans[0] >= 7
    np.testing.assert_array_equal(batch.latents[:, 0], np.where(of_class, 6 - plans[0], plans[0] + 1))
    np.testing.assert_array_equal(batch.conditions[LOSS_WEIGHT], np.where(of_class, 0.5, 1))


def test_a_class_without_one_of_the_shapes():
    with pytest.raises(UserError, match=r"no picture with latents of 16x8x1.*--prior.pictures"):
        WithPrior(Numbers(1, tall=5, square=2), Numbers(-1, square=60), weight=1.0)


def test_pictures_are_spread_in_proportion_to_the_nearest_shape_with_room():
    shares = {Bucket(16, 8): 5, Bucket(8, 8): 2, Bucket(8, 16): 1}
    squares = spread_over([(64, 64)] * 80, shares, minimum=4)
    assert dict(zip(squares.buckets, squares.counts)) == {(8, 16): 10, (8, 8): 20, (16, 8): 50}
    own = spread_over([(90, 50), (50, 50), (30, 60)] * 3, shares, minimum=1)
    chosen = [own.buckets[index] for index in own.bucket_of]
    assert chosen[::3] == [(16, 8)] * 3
    assert chosen.count((8, 16)) == 1
    assert chosen.index((8, 16)) % 3 == 2
    few = spread_over([(8, 8), (80, 8)], shares, minimum=1)
    assert [few.buckets[index] for index in few.bucket_of] == [(8, 8), (16, 8)]
    assert spread_over([], shares, minimum=1).counts == ()


# -- drawing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A model of two sizes, whose pipeline draws gray pictures and notes how."""
    table = (Bin(0.5, 8, 16), Bin(1.0, 8, 8))
    for module in (cache_plan, prior_data):
        monkeypatch.setattr(module, "size_table", lambda *_, **__: table)
    drawn = []

    def draw(caption, seed, num_inference_steps, height, width):
        drawn.append((caption, (height, width), jax.sharding.get_abstract_mesh().axis_names))
        return SimpleNamespace(images=[Image.new("L", (width, height), 3 * seed)])

    pipeline = SimpleNamespace(from_pretrained=lambda *_, **__: draw)
    monkeypatch.setattr(prior_data, "SanaPipeline", pipeline)
    model = gray_model(tmp_path / "model")
    return BaseModel(str(model.path), "SanaPipeline", model, "0123"), drawn


def subject(tmp_path, base: BaseModel, **prior):
    """Two square and four wide pictures, with a class, as a run opens them."""
    pictures = gray_pictures(tmp_path / "pictures", 2)
    for number in range(4):
        Image.new("L", (32, 16), 50 * number).save(pictures / f"w{number}.png")
        (pictures / f"w{number}.txt").write_text("a one")
    config = run_config(pictures, tmp_path / "cache")
    prepared(config, base.parts)
    config = dataclasses.replace(config, run_dir=str(tmp_path / "runs" / "run"), prior=PriorConfig(**prior))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=None))
    return config, CachedData(tmp_path / "cache", config.data)


def test_the_class_is_drawn_once_in_the_subjects_sizes(tmp_path, base):
    base, drawn = base
    config, own = subject(tmp_path, base, caption="a three", pictures=6)
    lines: list[str] = []
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    with jax.set_mesh(mesh):  # of a run, which no other process would be in
        dataset = prior_data.open_with_prior(config, base, own, lines.append, None)
    assert {axes for *_, axes in drawn} == {("encoders",)}
    assert sorted(size for _, size, _ in drawn) == [(8, 8)] * 2 + [(8, 16)] * 4
    assert {shape: len(rows) for shape, rows in dataset.prior.buckets.items()} == {(8, 8, 1): 2, (8, 16, 1): 4}
    assert any("prior: 0 pictures of 'a three'" in line and "draws 6 more" in line for line in lines)
    prior_data.open_with_prior(config, base, own, lines.append, None)
    assert len(drawn) == 6
    assert any("prior: 6 pictures of 'a three'" in line and "none is drawn" in line for line in lines)
    # a square picture of the user's is cut to what lacks one
    (folder,) = (tmp_path / "runs").glob("class-*")
    for path in folder.glob("*.png"):
        if Image.open(path).width == 16:
            Image.new("L", (8, 8)).save(path)
    dataset = prior_data.open_with_prior(config, base, own, lines.append, None)
    assert {shape: len(rows) for shape, rows in dataset.prior.buckets.items()} == {(8, 8, 1): 2, (8, 16, 1): 4}


def test_every_class_model_and_number_of_steps_has_a_folder_of_its_own(base):
    """Two captions without a Latin letter had one folder, and so one took the other's pictures."""
    base, _ = base
    found = set()
    for caption, steps, weights in (("犬の写真", 20, "a"), ("кошка", 20, "a"), ("кошка", 10, "a"), ("кошка", 20, "b")):
        prior = PriorConfig(caption=caption, num_inference_steps=steps)
        config = dataclasses.replace(run_config(None, None), prior=prior)
        made = prior_data.class_configuration(config, base._replace(weights_id=weights), {(8, 8): 1})
        found.add(made.data.path)
    assert len(found) == 4


def test_the_class_may_have_as_many_bad_files_as_the_subject(base):
    """The error about them advised to raise an option that the class did not read."""
    base, _ = base
    config = dataclasses.replace(run_config(None, None, max_bad_share=0.5), prior=PriorConfig(caption="a dog"))
    assert prior_data.class_configuration(config, base, {(8, 8): 1}).data.max_bad_share == 0.5


def test_pictures_that_were_drawn_of_something_else(tmp_path):
    def fill(caption: str, model: str) -> list[str]:
        lines: list[str] = []
        draw_prior_pictures(
            tmp_path / "class",
            caption,
            3,
            lambda *_: Image.new("L", (8, 8)),
            lines.append,
            sizes={(8, 8): 1},
            drawn_by={"model": model},
        )
        return lines

    fill("a dog", "a")
    assert "3 of them were drawn by another model" in fill("a dog", "b")[0]
    with pytest.raises(UserError, match=r"drawn_00000.png was drawn of 'a dog', and --prior.caption is 'a cat'"):
        fill("a cat", "a")
