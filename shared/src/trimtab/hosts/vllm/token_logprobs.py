"""The logprobs of a step's tokens, as the worker returned them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trimtab.core.policy import Call

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput


class TokenLogprobs:
    """Which rows of the worker's table belong to which call; a batch seldom changes."""

    def __init__(self) -> None:
        self._readers: dict[str, Call] = {}
        self._wanted: dict[str, int] = {}
        self._batch: list[str] = []
        self._calls: tuple[Call, ...] = ()
        self._rows: NDArray[np.intp] | None = None

    def __bool__(self) -> bool:
        return bool(self._readers)

    def add(self, call: Call, top: int) -> None:
        """Policies want so many top logprobs of a call's tokens."""
        self._readers[call.call_id], self._wanted[call.call_id] = call, top
        self._batch, self._calls = [], ()

    def remove(self, request_id: str) -> None:
        """A call has left; nothing may have been wanted of it."""
        if self._readers.pop(request_id, None) is not None:
            del self._wanted[request_id]
            self._batch, self._calls = [], ()

    def wanted(self, request_id: str) -> int | None:
        """How many top logprobs policies want of a request's tokens; None for nothing at all."""
        return self._wanted.get(request_id)

    def by_round(
        self, outputs: Mapping[int, EngineCoreOutputs], output: ModelRunnerOutput
    ) -> Iterator[tuple[Sequence[Call], NDArray[np.float32]]]:
        """Each call's first token of a step, then the second tokens of those that have one.

        Args:
            outputs: what each client is told; only who is told of tokens has got some.
            output: what the worker returned.

        Yields:
            calls, none twice, and their logprobs as `ServingPolicy.on_logprobs` takes them.
        """
        table = output.logprobs
        if table is None:
            return
        batch = output.req_ids
        told = sum(len(client.outputs) for client in outputs.values())
        if told != len(batch) or not all(output.sampled_token_ids):
            got = {o.request_id for c in outputs.values() for o in c.outputs if o.new_token_ids}
            self._find_rows([one if one in got else "" for one in batch])
        elif batch != self._batch:
            self._find_rows(list(batch))
        if not self._calls:
            return
        if table.cu_num_generated_tokens is None:
            logprobs = table.logprobs
            if self._rows is not None or len(logprobs) > len(self._calls):
                logprobs = logprobs.take(self._numbers(), axis=0)
            yield self._calls, logprobs
            return
        rows = self._numbers().tolist()
        lengths = [len(output.sampled_token_ids[row]) for row in rows]
        starts = [table.cu_num_generated_tokens[row] for row in rows]
        for turn in range(max(lengths)):
            having = [n for n, length in enumerate(lengths) if turn < length]
            calls = tuple(self._calls[n] for n in having)
            yield calls, table.logprobs[[starts[n] + turn for n in having]]

    def _find_rows(self, batch: list[str]) -> None:
        """Where the readers of a batch stand in it; a request that got no tokens has no name."""
        reading = [row for row, request_id in enumerate(batch) if request_id in self._readers]
        self._batch = batch
        self._calls = tuple(self._readers[batch[row]] for row in reading)
        self._rows = None if len(reading) == len(batch) else np.array(reading, dtype=np.intp)

    def _numbers(self) -> NDArray[np.intp]:
        return np.arange(len(self._calls)) if self._rows is None else self._rows
