"""Branches that the engine ends with an error."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output.request import StructuredOutputRequest

from trimtab.branches.note import Fate

pytestmark = pytest.mark.integration


class Grammar:
    """One that takes so many tokens."""

    def __init__(self, takes=10_000):
        self.taken = []
        self.takes = takes

    def accept_tokens(self, request_id, tokens):
        self.taken += tokens
        return len(self.taken) <= self.takes


def under(grammar):
    """Puts a request under a grammar that is compiled, or a future one."""

    def change(request):
        params = StructuredOutputsParams(regex="7*")
        request.structured_output_request = StructuredOutputRequest(params)
        request.structured_output_request.grammar = grammar
        request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR

    return change


def test_a_branch_that_the_engine_ends_with_an_error_is_no_answer(bed):
    dry = bed()

    def change(request):
        under(Grammar(5 if request.request_id == "0_a" else 10_000))(request)

    dry.ask("a", [90, 20, 30, 60], change=change, enough=2, pruning="off")
    dry.run()
    assert dry.reasons["0_a"] == ["error"]
    assert dry.finished("a") == {1, 2}
    assert dry.fates("a")[3] is Fate.STOPPED


def test_a_branch_that_failed_before_it_ran_does_not_count_as_one_that_waits(bed):
    dry = bed()
    broken = Future()
    broken.set_exception(ValueError("no grammar"))

    def change(request):
        under(broken if request.request_id == "1_a" else Grammar())(request)

    dry.ask("a", [20, 20, 30, 60], change=change, enough=2, pruning="off")
    dry.run()
    assert dry.finished("a") == {0, 2}
