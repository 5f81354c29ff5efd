"""The PyTorch side of the Gemma parity tests: tiny random models, and their weights in our layout."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import Gemma2Config, Gemma2Model

from sana_jax.models.gemma import GemmaConfig
from sana_jax.weights.rules import read_params
from sana_jax.weights.safetensors_files import TensorInfo
from sana_jax.weights.tables.gemma import gemma_rules
from sana_jax.weights.trees import abstract_tree

torch.set_num_threads(1)

TINY = {
    "head_dim": 16,
    "hidden_size": 24,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "vocab_size": 300,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "max_position_embeddings": 512,
}
# Every text is longer than the sliding window.
VARIANTS = {
    "three layers": {},
    "six heads on two": {
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "hidden_size": 30, "num_hidden_layers": 5,
        "query_pre_attn_scalar": 24, "rms_norm_eps": 1e-3, "sliding_window": 5,
    },
    "all heads alike": {"num_key_value_heads": 2, "num_hidden_layers": 4, "attn_logit_softcapping": 8.0},
    "no capping": {"attn_logit_softcapping": None, "num_hidden_layers": 2},
    "other order of layers": {
        "num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention", "sliding_attention",
                                                "full_attention"],
    },
}  # fmt: skip
LENGTHS = (9, 20, 1)  # tokens of the three texts, padded to the right
LENGTH = 20
MASK = (np.arange(LENGTH) < np.array(LENGTHS)[:, None]).astype(np.int32)


def torch_config(variant: str) -> Gemma2Config:
    return Gemma2Config(**{**TINY, **VARIANTS[variant]}, attn_implementation="eager")


def jax_config(variant: str) -> GemmaConfig:
    return GemmaConfig(**{**TINY, **VARIANTS[variant]})


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random; logits of attention are large enough for the capping to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(0.3 * draw)
            elif "embed" in name:
                parameter.copy_(draw)
            else:
                scale = 3.0 if "q_proj" in name else 1.0
                parameter.copy_(scale * draw / parameter.shape[1] ** 0.5)
    return model.eval()


@functools.cache
def torch_model(variant: str, dtype: torch.dtype = torch.float32) -> Gemma2Model:
    """The tiny model of a variant; do not change it."""
    return randomise(Gemma2Model(torch_config(variant)), list(VARIANTS).index(variant)).to(dtype)


def draw_ids(vocab_size: int, length: int = LENGTH, batch: int = len(LENGTHS)) -> np.ndarray:
    return np.random.default_rng(3).integers(0, vocab_size, (batch, length)).astype(np.int32)


def torch_output(
    variant: str, ids: np.ndarray, mask: np.ndarray | None, dtype: torch.dtype = torch.float32
) -> tuple[np.ndarray, np.ndarray]:
    """The last hidden state (B, L, D) and what goes into every layer with the result, (layers + 1, B, L, D)."""
    with torch.no_grad():
        out = torch_model(variant, dtype)(
            torch.from_numpy(ids).long(),
            attention_mask=None if mask is None else torch.from_numpy(mask),
            output_hidden_states=True,
        )
    return to_numpy(out.last_hidden_state), np.stack([to_numpy(state) for state in out.hidden_states])


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float32).numpy()


class StateDict:
    """A state dict as a source of tensors; on the meta device of names and shapes alone."""

    def __init__(self, state_dict: dict[str, torch.Tensor]) -> None:
        self.location = "a state dict"
        self._state_dict = state_dict
        self.tensors = {name: TensorInfo(np.dtype(np.float32), tuple(t.shape)) for name, t in state_dict.items()}

    def read(self, name: str) -> np.ndarray:
        return to_numpy(self._state_dict[name]).copy()


def our_params(model: torch.nn.Module, config: GemmaConfig, abstract: dict, dtype=jnp.float32) -> dict:
    """The weights of a Gemma2Model as our tree."""
    params = read_params(StateDict(model.state_dict()), gemma_rules(config), abstract_tree(abstract))
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), params)


def relative_error(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
