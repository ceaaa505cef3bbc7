"""What a reward signal for the branches of a request is: the interface of the plugin ``branches``.

A plugin offers signals by the hook `trimtab.core.hooks.trimtab_branch_scorers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from trimtab.core.policy import Call, Engine, Outcome

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class BranchScorer:
    """Base of every signal; override what it is about.

    A branch has a slot, a small number, from its arrival to its end; slots are used again. What a
    scorer raises switches the whole policy off, so it must deal with its own faults.

    Attributes:
        top_logprobs: how many of the largest logprobs of each token it reads; 0 is the sampled
            token's alone, None none at all.
    """

    top_logprobs: int | None = None

    def attach(self, engine: Engine) -> None:
        """The engine is up; called once, before anything else."""

    def start(self, slot: int, call: Call) -> None:
        """A branch has arrived, and has this slot from now on."""

    def observe(self, slots: NDArray[np.intp], logprobs: NDArray[np.float32]) -> None:
        """A step's tokens, no slot twice; in the engine's loop, so cheap for hundreds of rows.

        Args:
            slots: intp [rows], the branches.
            logprobs: float32 [rows, 1 + k], the sampled token's and the k largest, with k at least
                ``top_logprobs``.
        """

    def ask(self, slot: int, call: Call) -> None:
        """A score is due: the branch has passed a multiple of ``score_every``, or finished.

        What takes time begins here, and is told of by `arrived`.
        """

    def score(self, slot: int, call: Call) -> float | None:
        """The score in [0, 1] that was asked for last; None if there is none, or none yet."""
        raise NotImplementedError

    def arrived(self) -> Sequence[tuple[Call, int]]:
        """Calls whose scores have come in late, each with the length that the score is of."""
        return ()

    def awaits(self, slot: int, call: Call) -> bool:
        """Whether the answer to the last `ask` is still on its way.

        A branch that has finished keeps its slot until then, or until its request is over.
        """
        return False

    def finish(self, slot: int, call: Call, outcome: Outcome) -> None:
        """A branch has ended, nothing of it is awaited any more, and its slot is free."""


ScorerFactory = Callable[[int, Mapping[str, object]], BranchScorer]
"""Makes a signal from the window in tokens and the plugin's whole block of options."""
