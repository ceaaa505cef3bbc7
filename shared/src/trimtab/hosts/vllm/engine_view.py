"""What serving policies may ask of the vLLM engine that they run in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trimtab.core.policy import Call

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.v1.request import Request


class EngineView:
    """The tokens and texts of calls, as `trimtab.core.policy.Engine` has it.

    Args:
        model_config: whose tokenizer decodes; it is loaded when the first text is asked for.
        by_priority: whether the engine itself orders calls by their priority.
    """

    def __init__(self, model_config: ModelConfig, *, by_priority: bool) -> None:
        self._model_config = model_config
        self.by_priority = by_priority
        self.requests: dict[Call, Request] = {}
        """The requests behind the calls; the scheduler keeps it."""
        self.stop_reasons: dict[Call, int | str | None] = {}
        """Of the calls that are just finishing; the scheduler keeps it."""

    def prompt_ids(self, call: Call) -> Sequence[int]:
        """The tokens of a call's prompt; none where it came as embeddings."""
        return self.requests[call].prompt_token_ids or ()

    def output_ids(self, call: Call) -> Sequence[int]:
        """The tokens that a call has generated."""
        ids: Sequence[int] = self.requests[call].output_token_ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without special ones; their numbers where there is no tokenizer."""
        if self._tokenizer is None:
            return " ".join(map(str, token_ids))
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def stop_reason(self, call: Call) -> int | str | None:
        """The stop token or string that ended a call; None for the end of the text."""
        return self.stop_reasons.get(call)

    @cached_property
    def _tokenizer(self) -> Any:
        from vllm.tokenizers import cached_tokenizer_from_config

        if self._model_config.skip_tokenizer_init:
            return None
        return cached_tokenizer_from_config(self._model_config)
