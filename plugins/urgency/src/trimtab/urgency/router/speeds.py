"""Each server's speed for each stage, learnt from its answers."""

from __future__ import annotations

from collections import OrderedDict

from trimtab.urgency.dispatch import Prediction
from trimtab.urgency.estimate import Window

_MOST_STAGES = 512
_FIXED_TOKENS = 32
"""What a call costs before its first token besides its prompt, counted as so many tokens."""
_QUICK = 0.25
"""The quantile of the times to a first token that counts: the others waited for their turn."""
_UNKNOWN_OUTPUT_TOKENS = 64.0
_UNKNOWN_PROMPT_S = 0.0005
_UNKNOWN_OUTPUT_S = 0.02
"""What is supposed while nothing is known, so that a rule sees calls add up: nothing would not."""


class Rates:
    """Seconds per prompt token and per output token, and the output's usual length."""

    __slots__ = ("output_s", "output_tokens", "prompt_s")

    def __init__(self) -> None:
        self.prompt_s = Window()
        self.output_s = Window()
        self.output_tokens = Window()

    def add(self, prompt_s: float | None, output_s: float | None, output_tokens: int) -> None:
        """Takes one answer in; None for what it did not show."""
        if prompt_s is not None:
            self.prompt_s.add(prompt_s)
        if output_s is not None:
            self.output_s.add(output_s)
        self.output_tokens.add(float(output_tokens))


Key = tuple[str | None, int | None]
"""Stage and server's number; None for all of them."""


class Speeds:
    """What is known of all servers.

    What a stage has not shown on a server yet is taken from the server's other stages, then from
    the stage on other servers, then from everything seen so far: an unknown server counts as a
    usual one, and is tried.
    """

    def __init__(self) -> None:
        self._rates: OrderedDict[Key, Rates] = OrderedDict()

    def learn(
        self,
        stage: str,
        number: int,
        *,
        prompt_tokens: float,
        output_tokens: int,
        first_s: float | None,
        total_s: float,
    ) -> None:
        """Takes in a finished answer.

        Args:
            stage: the call's stage.
            number: the server's number.
            prompt_tokens: those that were not in its prefix cache.
            output_tokens: what was generated; 0 where the answer does not say.
            first_s: from sending to the first token; None where the answer came at once.
            total_s: from sending to the end.
        """
        size = prompt_tokens + _FIXED_TOKENS
        seen = self._quantile("prompt_s", stage, number) or 0.0
        before_s = first_s if first_s is not None else min(seen * size, 0.9 * total_s)
        output_s = (total_s - before_s) / output_tokens if output_tokens > 0 else None
        prompt_s = first_s / size if first_s is not None else None
        for key in _keys(stage, number):
            self._at(key).add(prompt_s, output_s, output_tokens)

    def predict(
        self, stage: str, number: int, *, prompt_tokens: float, output_tokens: float
    ) -> Prediction:
        """What a call takes on a server that has nothing else to do."""
        per_prompt_s = self._quantile("prompt_s", stage, number) or _UNKNOWN_PROMPT_S
        per_output_s = self._mean("output_s", stage, number) or _UNKNOWN_OUTPUT_S
        return Prediction(
            per_prompt_s * (prompt_tokens + _FIXED_TOKENS), per_output_s * output_tokens
        )

    def output_tokens(self, stage: str, *, said: float | None, longest: int) -> float:
        """The output's expected length: the client's word, or what was seen, within its limit."""
        if said is not None:
            return float(said)
        usual = self._mean("output_tokens", stage, None) or min(
            _UNKNOWN_OUTPUT_TOKENS, longest or _UNKNOWN_OUTPUT_TOKENS
        )
        return min(usual, longest) if longest else usual

    def table(self) -> dict[Key, Rates]:
        """What is known, by stage and server."""
        return dict(self._rates)

    def _quantile(self, quantity: str, stage: str, number: int | None) -> float | None:
        window = self._window(quantity, stage, number)
        return window.quantile(_QUICK) if window is not None else None

    def _mean(self, quantity: str, stage: str, number: int | None) -> float | None:
        window = self._window(quantity, stage, number)
        return window.mean() if window is not None else None

    def _window(self, quantity: str, stage: str, number: int | None) -> Window | None:
        for key in _keys(stage, number):
            rates = self._rates.get(key)
            if rates is not None:
                window: Window = getattr(rates, quantity)
                if len(window):
                    return window
        return None

    def _at(self, key: Key) -> Rates:
        found = self._rates.get(key)
        if found is None:
            if len(self._rates) >= _MOST_STAGES:
                self._rates.popitem(last=False)
            found = self._rates[key] = Rates()
        else:
            self._rates.move_to_end(key)
        return found


def _keys(stage: str, number: int | None) -> tuple[Key, ...]:
    """From what is nearest to a stage on a server to everything."""
    return tuple(dict.fromkeys(((stage, number), (None, number), (stage, None), (None, None))))
