from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from configs.schema import DigitsDataConfig
from sana_jax import UserError
from train.data import DigitsData
from train.data.digits import NAMES


def test_samples_are_the_pictures_and_their_captions():
    data = DigitsData(DigitsDataConfig())
    source = load_digits()
    assert len(data) == len(source.target) == 1797
    indices = np.asarray([0, 17, 1796, 17])
    batch = data.batch(indices)
    assert batch.latents.dtype == np.float32
    assert np.array_equal(batch.latents[..., 0] * 8 + 8, source.images[indices])
    for row, label in enumerate(source.target[indices]):
        embeds, mask = data.text_encoder.encode([f"a handwritten {NAMES[label]}"])
        assert np.array_equal(batch.prompt_embeds[row], embeds[0])
        assert np.array_equal(batch.prompt_attention_mask[row], mask[0])
    assert np.array_equal(batch.prompt_embeds[1], batch.prompt_embeds[3])


def test_captions_differ_and_differ_from_no_text():
    data = DigitsData(DigitsDataConfig())
    embeds, _ = data.text_encoder.encode(data.captions)
    null, _ = data.text_encoder.null_encoding()
    flat = np.concatenate([embeds, null]).reshape(11, -1)
    distances = np.linalg.norm(flat[:, None] - flat[None], axis=-1) + 100 * np.eye(11)
    assert distances.min() > 0.1


def test_some_digits():
    data = DigitsData(DigitsDataConfig(digits=(7, 3)))
    assert data.captions == ["a handwritten three", "a handwritten seven"]
    labels = load_digits().target
    labels = labels[np.isin(labels, (3, 7))]
    assert len(data) == len(labels)
    batch = data.batch(np.arange(len(data)))
    embeds, _ = data.text_encoder.encode(data.captions)
    assert np.array_equal(batch.prompt_embeds, embeds[(labels == 7).astype(int)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digits": ()}, "the data would be empty"),
        ({"digits": (1, 10)}, "name one or more of 0 to 9"),
        ({"caption": "a digit"}, "must have {digit}"),
        ({"caption": "{digit} {colour}"}, "no other braces"),
        ({"caption": "{digit"}, "must have {digit}"),
        ({"caption": "a b c d e f g {digit}"}, "--data.max-words"),
    ],
)
def test_settings_that_give_no_data(change, message):
    with pytest.raises(UserError, match=message):
        DigitsData(DigitsDataConfig(**change)).batch(np.arange(2))
