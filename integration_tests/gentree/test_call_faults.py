"""Whose fault it is that a call failed, by what all ranks say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.hosts.torch import call_faults
from trimtab.hosts.torch.call_faults import CallFaults, Passed
from trimtab.hosts.torch.plan_runner import PeerLost

pytestmark = pytest.mark.integration

RIGHT = Passed(7, "all_reduce(3 float32, SUM)", 11)
WRONG = {
    "what": replace(RIGHT, what="all_reduce(3 int32, SUM)"),
    "plan": replace(RIGHT, plan=12),
    "call": replace(RIGHT, call=8),
}


class Store:
    """A store that forgets nothing."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.said[key] = value

    def get(self, key: str) -> bytes:
        return self.said[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.said for key in keys)


class Gone:
    """A store whose rank is gone."""

    def __getattr__(self, name: str) -> object:
        raise ConnectionError(name)


class Clock:
    """Goes on while somebody sleeps."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def monotonic(self) -> float:
        return self._now_s

    def sleep(self, seconds: float) -> None:
        self._now_s += seconds


@st.composite
def failures(draw: st.DrawFn) -> tuple[list[int | None], int, str | None]:
    """Whom each rank waited for, if it says anything; a rank, and what is wrong with its call."""
    size = draw(st.integers(2, 6))
    lost = [
        draw(st.none() | st.sampled_from([r for r in range(size) if r != rank]))
        for rank in range(size)
    ]
    return lost, draw(st.integers(0, size - 1)), draw(st.none() | st.sampled_from([*WRONG]))


def told(lost: list[int | None], odd: int, wrong: str | None) -> dict[int, str]:
    """What each rank that lost another is told once all have said what they know."""
    store, names = Store(), [f"<{rank}>" for rank in range(len(lost))]
    heard = {}
    for _ in range(2):
        for rank, peer in enumerate(lost):
            if peer is not None:
                passed = WRONG[wrong] if wrong and rank == odd else RIGHT
                faults = CallFaults(store, rank, names)
                heard[rank] = faults.others(passed, PeerLost(peer, "timed out"))
    return heard


def culprit(rank: int, lost: list[int | None], odd: int, wrong: str | None) -> tuple[int, bool]:
    """Whom a rank is to name, and whether for another call: one goes from rank to rank."""
    at, path = lost[rank], [rank]
    while at is not None and at not in path and lost[at] is not None:
        if wrong in ("what", "plan") and odd in (rank, at):
            return at, True
        path.append(at)
        at = lost[at]
    if at in path:  # in a circle
        others = [one for one in path[1:] if wrong == "call" and odd in (rank, one)]
        return (others[0], True) if others else (lost[rank] or 0, False)
    return at or 0, False


@given(failures())
def test_each_names_the_rank_to_which_waiting_leads_and_never_itself(failure) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(call_faults, "time", Clock())
        for rank, message in told(*failure).items():
            blamed, differs = culprit(rank, *failure)
            assert blamed != rank
            assert message.startswith(f"<{blamed}> "), (message, failure)
            assert differs == ("failed" not in message), (message, failure)


def test_a_rank_that_failed_by_itself_is_named_whoever_was_lost() -> None:
    store, names = Store(), ["<0>", "<1>", "<2>"]
    own = CallFaults(store, 2, names).own(RIGHT, MemoryError("none left\nat all"))
    assert own == "<2> failed in all_reduce(3 float32, SUM): MemoryError: none left"
    assert CallFaults(store, 0, names).others(RIGHT, PeerLost(1, "late")) == own


def test_without_a_store_a_rank_names_whom_it_lost() -> None:
    faults = CallFaults(Gone(), 0, ["<0>", "<1>"])
    told = faults.others(RIGHT, PeerLost(1, "gone"))
    assert told.startswith("<1> failed or did not take part in time (gone), or another one before")
    others_told = CallFaults(Store(), 0, ["<0>", "<1>"]).others(RIGHT, PeerLost(1, "gone"))
    assert "the store does not answer" in told
    assert "the store" not in others_told
    assert faults.own(RIGHT, ValueError()).endswith("ValueError: ")
