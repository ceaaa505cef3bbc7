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

    __slots__ = ("_request",)

    def __init__(
        self,
        request: Request,
        arrival_s: float,
        fields: Mapping[str, FieldValue],
        request_id: str,
        branch: int,
    ) -> None:
        self._request = request
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
        count: int = self._request.num_output_tokens
        return count

    @output_tokens.setter
    def output_tokens(self, count: int) -> None:
        """The engine's own count stays."""
