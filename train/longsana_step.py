"""The steps of self-forcing: one of the generator, then several of the fake score, on whole videos or on windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from configs.longsana import SelfForcingConfig
from configs.schema import RunConfig
from kernels.typing import PyTree
from train.objectives.longsana.networks import Captions
from train.objectives.longsana.self_forcing import SelfForcing
from train.objectives.longsana.streaming import Stream, StreamingSelfForcing
from train.objectives.longsana.windows import Windows
from train.phases import Phase, PhaseOptimizers, make_phase_optimizers, make_phase_step, optimizer_beside, steps_of
from train.step import StepFunction

# Of the state's trees the one that holds what a video's windows leave.
STREAM = "stream"
# What each optimizer updates, of the tree of ``train.objectives.longsana.self_forcing``.
PARTS = {"generator": ("transformer",), "critic": ("fake",)}
# What the moving average is kept of: the network that is sampled.
AVERAGED = ("transformer",)


def stream_tree(stream: Stream) -> dict[str, Any]:
    """A stream as the dictionary that checkpoints hold."""
    state = stream.state
    return {
        "state": {
            "attention": {"key_value": state.attention.key_value, "key": state.attention.key},
            "last_frame": state.last_frame,
        },
        "history": stream.history,
        "captions": stream.captions._asdict(),
        "real_captions": stream.real_captions._asdict(),
    }


def stream_of(tree: dict[str, Any], like: Stream) -> Stream:
    """The inverse of ``stream_tree``; ``like`` has the rest of what a stream is, and may be shapes."""
    state, sums = tree["state"], like.state.attention
    attention = type(sums)(**state["attention"], num_cached_blocks=sums.num_cached_blocks)
    return Stream(
        type(like.state)(attention, state["last_frame"]),
        tree["history"],
        Captions(**tree["captions"]),
        Captions(**tree["real_captions"]),
    )


@dataclass(frozen=True)
class SelfForcingSteps:
    """Makes the optimizers and the step functions of a run.

    Attributes:
        settings: of the losses.
        config: of the run.
    """

    settings: SelfForcingConfig
    config: RunConfig

    def optimizers(self, trained: PyTree, windows: Windows | None = None) -> PhaseOptimizers:
        """One for the generator and one for the fake score; schedules count the steps of their own kind.

        Args:
            trained: the tree of parameters, or its shapes.
            windows: of a video; None for training on whole videos.

        Raises:
            UserError: settings that do not fit the parameters.
        """
        kinds = self.settings.cycle if windows is None else windows.kinds_of_steps(self.settings.cycle)
        beside = optimizer_beside(self.config.optimizer, self.settings.critic_learning_rate)
        options = {"generator": self.config.optimizer, "critic": beside}
        phases = [Phase(name, PARTS[name], options[name], steps_of(self.config, kinds, name)) for name in PARTS]
        return make_phase_optimizers(phases, trained)

    def on_whole_videos(self, losses: SelfForcing, optimizers: PhaseOptimizers) -> tuple[StepFunction, ...]:
        """Step number n is made with ``n % len``; steps of one kind are one function."""

        def generator(trained, frozen, batch, draws, step):
            return losses.generator_losses(trained, frozen, batch, draws), ()

        def critic(trained, frozen, batch, draws, step):
            return losses.critic_losses(trained, batch, draws), ()

        kinds = {"generator": (losses.draw_generator, generator), "critic": (losses.draw_critic, critic)}
        made = {phase.name: self._make(phase, optimizers, *kinds[phase.name]) for phase in optimizers.phases}
        return tuple(made[name] for name in self.settings.cycle)

    def on_windows(self, streaming: StreamingSelfForcing, optimizers: PhaseOptimizers) -> tuple[StepFunction, ...]:
        """Likewise; a video's first window is a kind of its own, since it has other shapes."""
        made = {
            (phase.name, first): self._on_window(streaming, phase, optimizers, first)
            for phase in optimizers.phases
            for first in (True, False)
        }
        kinds = streaming.windows.kinds_of_steps(self.settings.cycle)
        return tuple(made[kind, streaming.windows.is_first(step)] for step, kind in enumerate(kinds))

    def _on_window(
        self, streaming: StreamingSelfForcing, phase: Phase, optimizers: PhaseOptimizers, first: bool
    ) -> StepFunction:
        losses_of = streaming.generator_losses if phase.name == "generator" else streaming.critic_losses

        def draw(seed, step, batch):
            return streaming.draw(phase.name, seed, step, batch, first=first)

        def losses(trained, frozen, batch, draws, step):
            stream = stream_of(trained[STREAM], streaming.init_stream(batch))
            found = losses_of({**trained, STREAM: stream}, frozen, batch, draws, step, first=first)
            return found.losses, stream_tree(found.stream)

        def replaced(before, carried, finite):
            # also of a step that does not count: the next window follows this one, in time and place
            return {STREAM: carried}

        return self._make(phase, optimizers, draw, losses, replaced=replaced)

    def _make(self, phase: Phase, optimizers: PhaseOptimizers, draw, losses_of, **more) -> StepFunction:
        averages = {"averaged": AVERAGED, "steps_per_update": len(self.settings.cycle)}
        more |= averages if phase.name == "generator" else {}
        return make_phase_step(phase, optimizers.transformations[phase.name], self.config, draw, losses_of, **more)
