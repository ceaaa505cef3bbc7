"""Sums whose working out is as long as they are, which a small model gets right now and then."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from openai.types.chat import ChatCompletionMessageParam as Message

LARGEST = 4
EXAMPLES = 8


@dataclass(frozen=True)
class Sum:
    """A sum to be worked out step by step."""

    addends: tuple[int, ...]

    @property
    def question(self) -> str:
        return f"What is {' + '.join(map(str, self.addends))}?"

    @property
    def asked(self) -> Message:
        return {"role": "user", "content": self.question}

    @property
    def answer(self) -> str:
        return str(sum(self.addends))

    @property
    def messages(self) -> list[Message]:
        """The question after examples with as many addends: with others the model only guesses."""
        draw = random.Random(0)
        shown = [drawn(draw, len(self.addends)) for _ in range(EXAMPLES)]
        told: list[Message] = []
        for number, example in enumerate(shown):
            told += [example.asked, worked(example, checked=number % 2 == 1)]
        return [*told, self.asked]


def sums(count: int, seed: int) -> list[Sum]:
    """Sums of two to five addends."""
    draw = random.Random(seed)
    return [drawn(draw, 2 + i % 4) for i in range(count)]


def drawn(draw: random.Random, length: int) -> Sum:
    return Sum(tuple(draw.randint(1, LARGEST) for _ in range(length)))


def worked(example: Sum, checked: bool) -> Message:
    """The example's working out, once or from both ends: so branches differ in length."""
    lines = steps(example.addends)
    if checked:
        lines += ["Let me check.", *steps(example.addends[::-1])]
    return {"role": "assistant", "content": "\n".join([*lines, f"Final answer: {example.answer}"])}


def steps(addends: Sequence[int]) -> list[str]:
    """One addition a line."""
    sums_so_far = pairwise(accumulate(addends))
    return [f"{a} + {b} = {c}" for (a, c), b in zip(sums_so_far, addends[1:], strict=True)]
