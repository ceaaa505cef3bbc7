"""A process-reward model beside the engine or elsewhere, asked over HTTP while branches go on."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.branches.config import PrmOptions
from trimtab.branches.prm import PrmScorer
from trimtab.core.branch_scoring import BranchScorer
from trimtab.core.policy import Call, Engine, Outcome


class RewardModel(BranchScorer):
    """The model's score of a branch's last step.

    Args:
        options: where the model is served.
    """

    def __init__(self, options: PrmOptions) -> None:
        self._options = options
        self._engine: Engine | None = None
        self._model: PrmScorer | None = None
        self._calls: dict[str, Call] = {}
        self._values: dict[Call, float] = {}
        self._asked_at: dict[Call, int] = {}
        """The lengths of the branches whose newest text is not scored yet."""

    def attach(self, engine: Engine) -> None:
        """Starts the thread that asks the model."""
        self._engine = engine
        self._model = PrmScorer(self._options, engine.decode)

    def start(self, slot: int, call: Call) -> None:
        """Remembers whose answers are wanted."""
        self._calls[call.call_id] = call

    def ask(self, slot: int, call: Call) -> None:
        """Sends the branch as it is now; what was known of it is out of date."""
        self._values.pop(call, None)
        if self._model is not None and self._engine is not None:
            prompt, output = self._engine.prompt_ids(call), self._engine.output_ids(call)
            self._model.submit(call.call_id, prompt, output)
            self._asked_at[call] = len(output)

    def score(self, slot: int, call: Call) -> float | None:
        """The model's answer to the last question, once it has come."""
        return self._values.get(call)

    def awaits(self, slot: int, call: Call) -> bool:
        """Whether the model has not said what it thinks of the text that was sent last."""
        return call in self._asked_at

    def arrived(self) -> Sequence[tuple[Call, int]]:
        """Takes in the answers that have come."""
        if self._model is None:
            return ()
        late = []
        for key, at_tokens, value in self._model.take():
            call = self._calls.get(key)
            if call is not None:
                self._values[call] = value
                if at_tokens >= self._asked_at.get(call, 0):
                    self._asked_at.pop(call, None)
                late.append((call, at_tokens))
        return late

    def finish(self, slot: int, call: Call, outcome: Outcome) -> None:
        """Withdraws what was asked of a branch that has ended."""
        self._calls.pop(call.call_id, None)
        self._values.pop(call, None)
        self._asked_at.pop(call, None)
        if self._model is not None:
            self._model.forget([call.call_id])
