"""What a run trains: which parameters, where they begin, and how they make a network together with the base model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

from jax.sharding import Mesh

from configs.schema import RunConfig
from kernels.typing import Array, Float, Int, PRNGKeyArray, PyTree
from sana_jax.diffusion.samplers import Sampler
from sana_jax.models.sharding_rules import Rule
from sana_jax.pipelines.families import Transformer
from train.step import StepFunction


class Prompts(NamedTuple):
    """Encoded prompts, and of no text, for sampling."""

    embeds: Float[Array, "B L C"]
    mask: Int[Array, "B L"]
    null_embeds: Float[Array, "1 L C"]
    null_mask: Int[Array, "1 L"]


NullEncoding = tuple[Float[Array, "1 L C"], Int[Array, "1 L"]]
SamplingFunction = Callable[[PyTree, PyTree, Float[Array, "B *X C"], Prompts, Mapping[str, Array]], Array]


class Recipe(Protocol):
    """Parameters as two trees: ``trained``, which the optimizer updates, and ``frozen``, the base model's.

    Attributes:
        transformer: the network that is sampled.
        rules: where the trained parameters lie on a mesh.
        keeps_base: whether the base model's parameters stay in memory, as ``frozen``.
        copies_base: whether the trained parameters begin as the base model's, of which they need every bit; where not,
            its shapes are enough.
        kind: what a run directory calls it.
        conditions: names of further arrays that a batch must have.
    """

    transformer: Transformer
    rules: tuple[Rule, ...]
    keeps_base: ClassVar[bool]
    copies_base: ClassVar[bool]
    kind: ClassVar[str]
    conditions: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        """What must be known, beside the trained parameters and the base model, to use them: JSON-able."""
        ...

    def notes(self, learning_rate: float | None, base: PyTree | None) -> list[str]:
        """What a user should know before training: lines to print.

        Args:
            learning_rate: the peak.
            base: the base model's parameters as shapes.
        """
        ...

    def initialize(self, key: PRNGKeyArray, base: PyTree | None) -> PyTree:
        """The trained parameters of step 0, float32; ``base`` are the base model's, None without one."""
        ...

    def averaged(self, trained: PyTree) -> PyTree:
        """What the moving average is kept of, and pictures are drawn with."""
        ...

    def frozen(self, base: PyTree | None, mesh: Mesh) -> PyTree | None:
        """What stays in memory beside the trained parameters, from the base model's, or from their shapes."""
        ...

    def optimizer(self, config: RunConfig, trained: PyTree) -> Any:
        """The optimizer, with ``init(trained)``; ``trained`` may be shapes."""
        ...

    def step_functions(
        self, config: RunConfig, optimizer: Any, null_encoding: NullEncoding
    ) -> tuple[StepFunction, ...]:
        """The kinds of step, used in turn; ``null_encoding`` is the encoding of no text, or of a negative prompt."""
        ...

    def sampling_function(self, sampler: Sampler, num_inference_steps: int, guidance_scale: float) -> SamplingFunction:
        """``fn(averaged, frozen, latents, prompts, conditions)`` -> latents: a whole sampling run, to be jitted."""
        ...
