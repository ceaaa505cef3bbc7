"""Words to count, told at different lengths: what a small model gets right now and then.

The examples before each question count plainly, slowly, or twice, so that branches of one question
differ in length, as reasoning does. SmolLM2-135M gets about a third of its branches right.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

FEWEST, MOST = 2, 5
"""How many words are to be counted."""

EXAMPLES = 6

_WORDS = """
    cat sun red tree book fish star blue door milk hand rain bird shoe cake lamp ring moon fork sand
"""
WORDS = tuple(_WORDS.split())

Message = dict[str, str]

_SAID = re.compile(r"answer is (-?\d+)")


@dataclass(frozen=True, slots=True)
class Count:
    """A question, and how it is asked.

    Attributes:
        words: what is to be counted.
    """

    words: tuple[str, ...]

    @property
    def question(self) -> str:
        """The question alone."""
        return f"How many words are these: {', '.join(self.words)}?"

    @property
    def answer(self) -> str:
        """The right answer."""
        return str(len(self.words))

    @property
    def messages(self) -> list[Message]:
        """The question after the examples."""
        return [*examples(), {"role": "user", "content": self.question}]


def counts(count: int, seed: int) -> list[Count]:
    """Different questions, as many of each number of words as of any other."""
    draw = random.Random(seed)
    found: dict[Count, None] = {}
    while len(found) < count:
        length = FEWEST + len(found) % (MOST - FEWEST + 1)
        found[Count(tuple(draw.sample(WORDS, length)))] = None
    return list(found)


def said(text: str) -> str | None:
    """The last answer that a text gives."""
    found = _SAID.findall(text)
    return str(int(found[-1])) if found else None


@cache
def examples() -> tuple[Message, ...]:
    """Words that are counted, each time in another way than before."""
    draw = random.Random(0)
    told = (plainly, slowly, twice)
    shown: list[Message] = []
    for number in range(EXAMPLES):
        length = FEWEST + 3 * number % (MOST - FEWEST + 1)
        example = Count(tuple(draw.sample(WORDS, length)))
        counted = f"{told[number % len(told)](example.words)} The answer is {example.answer}."
        shown += [
            {"role": "user", "content": example.question},
            {"role": "assistant", "content": counted},
        ]
    return tuple(shown)


def plainly(words: Sequence[str]) -> str:
    """Counted as in ``cat 1. sun 2.``."""
    return " ".join(f"{word} {number}." for number, word in enumerate(words, 1))


def slowly(words: Sequence[str]) -> str:
    """The same in sentences."""
    heads = ["First", *["Then"] * (len(words) - 1)]
    counted = zip(heads, words, range(1, len(words) + 1), strict=True)
    return " ".join(f"{head} {word}, which makes {number}." for head, word, number in counted)


def twice(words: Sequence[str]) -> str:
    """Counted plainly, then once more from the other end."""
    return f"{plainly(words)} Once more: {plainly(words[::-1])}"
