"""Which prompt acts when in a long video: ``"0s: a fox sleeps"``, ``"10s: it wakes up"``."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sana_jax.errors import UserError, counted
from sana_jax.videos import is_real

_TIMED = re.compile(r"\s*(-?[\d.]+)\s*s\s*:\s*(.*)", re.DOTALL)
_FORM = 'one text, or several that each begin with a time: "0s: a fox sleeps" "10s: it wakes up"'


class PromptSwitch(NamedTuple):
    """A prompt and the second at which it begins to act."""

    seconds: float
    prompt: str


@dataclasses.dataclass(frozen=True)
class BlockPrompts:
    """A video's prompts by blocks: those of the call, and those that its callback gave on the way.

    In every block that prompt acts which began last; of two that begin with the same block, the callback's.

    Attributes:
        planned: the number of the first block, from 0, and the text, of every prompt of the call.
        given: the same of those that the callback gave.
    """

    planned: tuple[tuple[int, str], ...]
    given: tuple[tuple[int, str], ...] = ()

    @classmethod
    def of_schedule(cls, switches: Sequence[PromptSwitch], numbers: Sequence[int]) -> BlockPrompts:
        """Those of a call; ``numbers`` are the numbers of the prompts of all blocks, as ``prompts_of_blocks`` says."""
        return cls(tuple((numbers.index(number), switch.prompt) for number, switch in enumerate(switches)))

    def acting(self, block: int) -> str:
        """The prompt of a block."""
        begun = sorted((*self.planned, *self.given), key=lambda entry: entry[0])
        return [text for first, text in begun if first <= block][-1]

    def changed(self, block: int, text: str) -> BlockPrompts:
        """The same with a prompt of the callback from ``block`` on."""
        return dataclasses.replace(self, given=(*self.given, (block, text)))

    def runs(self, blocks: Iterable[int]) -> list[tuple[int, str]]:
        """(first block, prompt) of all stretches of ``blocks`` in which one prompt acts."""
        runs = itertools.groupby(blocks, key=self.acting)
        return [(next(iter(own)), text) for text, own in runs]

    def to_dict(self) -> dict[str, Any]:
        """As values of JSON."""
        return {field: [list(entry) for entry in entries] for field, entries in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockPrompts:
        """The inverse of ``to_dict``; raises ``ValueError`` for anything else."""
        try:
            found = {name: tuple((first, text) for first, text in values[name]) for name in ("planned", "given")}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("it holds no prompts of blocks") from error
        entries = [*found["planned"], *found["given"]]
        if not all(type(first) is int and isinstance(text, str) for first, text in entries) or not any(
            first == 0 for first, _ in found["planned"]
        ):
            raise ValueError("it holds no prompts of blocks")
        return cls(**found)


def parse_prompts(prompt: Any) -> tuple[PromptSwitch, ...]:
    """The prompts of a video in order of time.

    Args:
        prompt: one text; or several, each a pair (seconds, text) or a text that begins with its time.

    Raises:
        UserError: what is no text, several prompts of which not all have a time, times that do not ascend from 0, or
            empty texts.
    """
    if not isinstance(prompt, Iterable):
        raise UserError(f"prompt {prompt!r} is not allowed; allowed is {_FORM}")
    given = [prompt] if isinstance(prompt, str) else list(prompt)
    switches = [switch for each in given if (switch := _timed(each)) is not None]
    if not switches and len(given) == 1 and isinstance(given[0], str):
        switches = [PromptSwitch(0.0, given[0])]
    if not given or len(switches) != len(given):
        there = f"{counted(len(given), 'prompt')}, {len(switches)} of them with a time"
        raise UserError(f"{there}, for one video; allowed is {_FORM}")
    times = [switch.seconds for switch in switches]
    said = ", ".join(f"{time:g} s" for time in times)
    if not all(math.isfinite(time) for time in times) or times[0] != 0:
        raise UserError(f"prompts begin at {said}; the first must begin at 0 s and the others later: mend the times")
    for before, after in itertools.pairwise(times):
        if after <= before:
            raise UserError(
                f"prompts begin at {said}; times must ascend, and {after:g} s comes after {before:g} s: put the "
                "prompts in order"
            )
    for switch in switches:
        if not switch.prompt.strip():
            raise UserError(f"the prompt at {switch.seconds:g} s is empty; say what the video shows from then on")
    return tuple(switches)


def refuse_schedule(prompt: Any, pipeline: str) -> None:
    """Raises ``UserError`` for prompts that begin with times, where ``pipeline`` would take the times for words.

    They are known by the first one's 0 s; "1920s: a jazz band" is a text as any other.
    """
    texts = [prompt] if isinstance(prompt, str) else prompt
    first = texts[0] if isinstance(texts, Sequence) and texts else None
    timed = _timed(first) if isinstance(first, str) else None
    if timed is not None and timed.seconds == 0:
        raise UserError(
            f"prompt {first!r} begins with a time, and prompts of {pipeline} do not change on the way, as LongSANA's "
            "do: leave the time out, or choose a LongSANA model"
        )


def note_untimed(prompts: Sequence[str], say: Callable[[str], None] = print) -> None:
    """Says which prompts begin as with a time and have no colon behind it, so that all of it is text."""
    for text in prompts:
        if found := re.match(r"\s*(\d[\d.]*)\s*s\s+(?!:)", text):
            rest = text[found.end() :]
            say(f'prompt {text!r} is text from its beginning; a time has a colon behind it: "{found[1]}s: {rest}"')


def check_next_prompt(text: str) -> None:
    """Raises ``UserError`` for a callback's prompt that is empty or begins with a time."""
    if not text.strip():
        raise UserError("the callback's prompt is empty; say what the video shows from the next block on")
    if _timed(text) is not None:
        raise UserError(
            f"the callback's prompt {text!r} begins with a time, and it acts from the next block on: leave the time out"
        )


def _timed(given: Any) -> PromptSwitch | None:
    if isinstance(given, str):
        found = _TIMED.fullmatch(given)
        try:
            return None if found is None else PromptSwitch(float(found[1]), found[2].strip())
        except ValueError:
            return None
    is_pair = isinstance(given, Sequence) and len(given) == 2 and isinstance(given[1], str)
    if not is_pair or not is_real(given[0]):
        raise UserError(f"prompt {given!r} is not allowed; allowed is {_FORM}, or pairs (10.0, text)")
    return PromptSwitch(float(given[0]), given[1])


def prompts_of_blocks(
    switches: Sequence[PromptSwitch],
    block_seconds: Sequence[float],
    duration: float,
    say: Callable[[str], None] = print,
) -> tuple[int, ...]:
    """The number of the prompt that acts in each block: one begins with the block whose beginning is nearest to it.

    Args:
        switches: as ``parse_prompts`` gives them.
        block_seconds: when the blocks begin, from 0.
        duration: of the video, in seconds.
        say: prints a line for every switch: when it really acts.

    Raises:
        UserError: a time beyond the video, or two prompts for one block.
    """
    first_blocks: list[int] = []
    for switch in switches:
        if switch.seconds >= duration:
            raise UserError(
                f"a prompt begins at {switch.seconds:g} s, and the video has {duration:g} s; name a time before its "
                "end, or make it longer"
            )
        block = min(range(len(block_seconds)), key=lambda index: abs(block_seconds[index] - switch.seconds))
        if first_blocks and block <= first_blocks[-1]:
            before = switches[len(first_blocks) - 1].seconds
            raise UserError(
                f"the prompts at {before:g} s and {switch.seconds:g} s fall into one block (block {block + 1}, from "
                f"{block_seconds[block]:g} s); a block has one prompt: put them farther apart, or leave one out"
            )
        first_blocks.append(block)
        if len(switches) > 1:
            exact = block_seconds[block] == switch.seconds
            from_then = "" if exact else f", asked for at {switch.seconds:g} s"
            say(f"from {block_seconds[block]:g} s{from_then} (block {block + 1}): {switch.prompt!r}")
    return tuple(
        max(number for number, first in enumerate(first_blocks) if first <= block)
        for block in range(len(block_seconds))
    )
