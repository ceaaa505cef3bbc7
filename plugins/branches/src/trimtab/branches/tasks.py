"""Sums worked out once or twice: what a small model gets right now and then.

The examples before a question have as many addends as it has, since with others SmolLM2-135M only
guesses; every second one checks itself, so that branches of one question differ in length, as
reasoning does. At temperature 0.8 half of its branches are right.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

FEWEST, MOST = 2, 5
"""How many addends a sum has."""

LARGEST = 4
EXAMPLES = 8

Message = dict[str, str]

_SAID = re.compile(r"[Aa]nswer: (-?\d+)")


@dataclass(frozen=True, slots=True)
class Sum:
    """A question, and how it is asked.

    Attributes:
        addends: what is to be added up.
    """

    addends: tuple[int, ...]

    @property
    def question(self) -> str:
        """The question alone."""
        return f"What is {' + '.join(map(str, self.addends))}?"

    @property
    def answer(self) -> str:
        """The right answer."""
        return str(sum(self.addends))

    @property
    def messages(self) -> list[Message]:
        """The question after the examples."""
        return [*examples(len(self.addends)), {"role": "user", "content": self.question}]


def sums(count: int, seed: int) -> list[Sum]:
    """Questions, as many of each number of addends as of any other."""
    draw = random.Random(seed)
    return [_drawn(draw, FEWEST + number % (MOST - FEWEST + 1)) for number in range(count)]


def said(text: str) -> str | None:
    """The last answer that a text gives."""
    found = _SAID.findall(text)
    return str(int(found[-1])) if found else None


@cache
def examples(length: int) -> tuple[Message, ...]:
    """Sums of so many addends that are worked out, in turn once and from both ends."""
    draw = random.Random(length)
    shown: list[Message] = []
    for number in range(EXAMPLES):
        example = _drawn(draw, length)
        worked = (checked if number % 2 else plainly)(example.addends)
        shown += [
            {"role": "user", "content": example.question},
            {"role": "assistant", "content": f"{worked}\nFinal answer: {example.answer}"},
        ]
    return tuple(shown)


def plainly(addends: Sequence[int]) -> str:
    """One addition a line: ``3 + 4 = 7``."""
    steps = zip(pairwise(accumulate(addends)), addends[1:], strict=True)
    return "\n".join(f"{before} + {addend} = {after}" for (before, after), addend in steps)


def checked(addends: Sequence[int]) -> str:
    """Worked out, then once more from the other end."""
    return f"{plainly(addends)}\nLet me check.\n{plainly(addends[::-1])}"


def _drawn(draw: random.Random, length: int) -> Sum:
    return Sum(tuple(draw.randint(1, LARGEST) for _ in range(length)))
