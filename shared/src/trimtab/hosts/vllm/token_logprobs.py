"""The logprobs of a step's tokens, as the worker returned them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trimtab.core.policy import Call

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from vllm.v1.outputs import ModelRunnerOutput


def by_round(
    calls: Sequence[Call], output: ModelRunnerOutput
) -> Iterator[tuple[Sequence[Call], NDArray[np.float32]]]:
    """Each call's first token of a step, then the second tokens of those that have one, and so on.

    Args:
        calls: those that got tokens.
        output: what the worker returned, with logprobs.

    Yields:
        calls, none twice, and their logprobs as `ServingPolicy.on_logprobs` takes them.
    """
    table = output.logprobs
    if not calls or table is None:
        return
    index = output.req_id_to_index
    rows = [index[call.call_id] for call in calls]
    if table.cu_num_generated_tokens is None:
        yield calls, table.logprobs.take(rows, axis=0)
        return
    lengths = [len(output.sampled_token_ids[row]) for row in rows]
    starts = [table.cu_num_generated_tokens[row] for row in rows]
    for turn in range(max(lengths)):
        having = [n for n, length in enumerate(lengths) if turn < length]
        yield [calls[n] for n in having], table.logprobs[[starts[n] + turn for n in having]]
