"""The vLLM that is installed still has every symbol the host relies on."""

import pytest

from trimtab.hosts.vllm import contract

pytestmark = pytest.mark.integration


def test_nothing_is_broken():
    assert contract.broken() == []


def test_a_moved_symbol_is_named(monkeypatch):
    monkeypatch.setattr(
        contract,
        "METHODS",
        {
            "vllm.v1.request:Request.is_finished": ("self", "really"),
            "vllm.v1.request:Request.is_gone": ("self",),
            "vllm.nowhere:f": (),
        },
    )
    monkeypatch.setattr(contract, "SCHEDULER_ATTRIBUTES", ("no_such_attribute",))
    monkeypatch.setattr(contract, "ABSTRACT_QUEUE", contract.ABSTRACT_QUEUE - {"pop_request"})
    faults = contract.broken()
    assert faults[0] == "vllm.v1.request:Request.is_finished takes (self), not (self, really)"
    assert faults[1:3] == ["vllm.v1.request:Request.is_gone is gone", "vllm.nowhere:f is gone"]
    assert "no_such_attribute" in faults[3]
    assert "pop_request" in faults[4]
