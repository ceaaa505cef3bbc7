"""A call whose tokens the engine itself counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.policy import Call, FieldValue

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.v1.request import Request


class EngineCall(Call):
    """A call of vLLM; nobody has to count its tokens from step to step.

    Args:
        request: what vLLM knows of it.
        arrival_s: see `Call`, as the rest.
    """

    __slots__ = ("_request", "_tokens")

    def __init__(
        self,
        request: Request,
        arrival_s: float,
        fields: Mapping[str, FieldValue],
        request_id: str,
        branch: int,
    ) -> None:
        self._request: Request | None = request
        self._tokens = 0
        super().__init__(
            call_id=request.request_id,
            arrival_s=arrival_s,
            prompt_tokens=request.num_prompt_tokens,
            max_output_tokens=request.max_tokens,
            fields=fields,
            priority=request.priority,
            request_id=request_id,
            branch=branch,
        )

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        return self._tokens if self._request is None else self._request.num_output_tokens

    @output_tokens.setter
    def output_tokens(self, count: int) -> None:
        """The engine's own count stays."""

    def leave(self) -> None:
        """The call is over: its count stays, and nobody who keeps it keeps vLLM's request."""
        self._tokens, self._request = self.output_tokens, None
