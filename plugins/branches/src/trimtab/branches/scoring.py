"""The score of a branch: the weighted mean of the signals that the configuration names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from trimtab.branches.config import BranchesConfig
from trimtab.branches.signals import tokens
from trimtab.branches.signals.replay import Replay
from trimtab.branches.signals.shortness import Shortness
from trimtab.core import hooks
from trimtab.core.branch_scoring import BranchScorer
from trimtab.core.errors import BadInput
from trimtab.core.policy import Call, Engine, Outcome

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TOKEN_SIGNALS: Mapping[str, Callable[..., BranchScorer]] = {
    "probability": partial(tokens.LastWindow, tokens.PROBABILITY),
    "lowest_probability": partial(tokens.LowestWindow, tokens.PROBABILITY),
    "confidence": partial(tokens.LastWindow, tokens.CONFIDENCE),
    "lowest_confidence": partial(tokens.LowestWindow, tokens.CONFIDENCE),
    "entropy": partial(tokens.LastWindow, tokens.ENTROPY),
}


class Score:
    """The signals in use.

    Args:
        scorers: each signal with its weight, by its name.
    """

    def __init__(self, scorers: Mapping[str, tuple[BranchScorer, float]]) -> None:
        self._scorers = list(scorers.values())
        self._readers = [s for s, _ in self._scorers if s.top_logprobs is not None]
        wanted = [s.top_logprobs for s in self._readers if s.top_logprobs is not None]
        self.top_logprobs: int | None = max(wanted, default=None)

    @staticmethod
    def of(config: BranchesConfig) -> Score:
        """The signals that the options name.

        Raises:
            BadInput: no plugin offers one of them, or one lacks its options.
        """
        return Score(
            {name: (_scorer(name, config), weight) for name, weight in config.signals.items()}
        )

    def attach(self, engine: Engine) -> None:
        """Shows every signal the engine."""
        for scorer, _ in self._scorers:
            scorer.attach(engine)

    def start(self, slot: int, call: Call) -> None:
        """A branch has arrived."""
        for scorer, _ in self._scorers:
            scorer.start(slot, call)

    def observe(self, slots: NDArray[np.intp], logprobs: NDArray[np.float32]) -> None:
        """A step's tokens."""
        for scorer in self._readers:
            scorer.observe(slots, logprobs)

    def ask(self, slot: int, call: Call) -> None:
        """A score of a branch is due."""
        for scorer, _ in self._scorers:
            scorer.ask(slot, call)

    def score(self, slot: int, call: Call) -> float | None:
        """The weighted mean of the signals that know something; None where none does."""
        total, weights = self.known(slot, call)
        return total / weights if weights else None

    def known(self, slot: int, call: Call) -> tuple[float, float]:
        """The weighted sum of the signals that know something, and the sum of their weights."""
        total = weights = 0.0
        for scorer, weight in self._scorers:
            value = scorer.score(slot, call)
            if value is not None:
                total += weight * value
                weights += weight
        return total, weights

    def awaits(self, slot: int, call: Call) -> bool:
        """Whether the answer of some signal is still on its way."""
        return any(scorer.awaits(slot, call) for scorer, _ in self._scorers)

    def arrived(self) -> Sequence[tuple[Call, int]]:
        """The calls of which a signal has come in late, with the length it is of."""
        return [late for scorer, _ in self._scorers for late in scorer.arrived()]

    def finish(self, slot: int, call: Call, outcome: Outcome) -> None:
        """A branch has ended."""
        for scorer, _ in self._scorers:
            scorer.finish(slot, call, outcome)


def _scorer(name: str, config: BranchesConfig) -> BranchScorer:
    if name in _TOKEN_SIGNALS:
        return _TOKEN_SIGNALS[name](window=config.window)
    if name == "shortness":
        return Shortness()
    if name == "replay":
        return Replay()
    if name == "prm":
        return _reward_model(config)
    offered = {
        signal: factory
        for plugin in hooks.discover()[0]
        for signal, factory in plugin.branch_scorers().items()
    }
    if name not in offered:
        own = ", ".join([*_TOKEN_SIGNALS, "shortness", "prm", "replay"])
        raise BadInput(
            f"no plugin offers a signal {name!r}",
            where="trimtab.branches.signals",
            fix=f"name some of {own}" + "".join(f", {signal}" for signal in sorted(offered)),
        )
    return offered[name](config.window, config.model_dump())


def _reward_model(config: BranchesConfig) -> BranchScorer:
    from trimtab.branches.signals.reward_model import RewardModel

    if config.prm is None:
        raise BadInput(
            "the signal 'prm' has no reward model",
            where="trimtab.branches.prm",
            fix='give {"url": "http://host:port", "model": "name"}',
        )
    return RewardModel(config.prm)
