"""In which thread what follows a call runs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from trimtab.hosts.torch.planned_call import Callbacks, CallThread, PlannedWork

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("way", ["then", "add_done_callback"])
def test_what_follows_a_call_that_is_over_runs_in_no_callers_thread(monkeypatch, way: str) -> None:
    """However fast that thread is: calls of callbacks would come in another order on each rank."""
    put = Callbacks.put

    def at_once(self: Callbacks, what: Callable[[], None]) -> None:
        over = threading.Event()

        def run() -> None:
            what()
            over.set()

        put(self, run)
        assert over.wait(30)

    monkeypatch.setattr(Callbacks, "put", at_once)
    thread = CallThread()
    work = PlannedWork([], thread.callbacks)
    work.finish()
    ran: list[str] = []
    getattr(work.get_future(), way)(lambda _: ran.append(threading.current_thread().name))
    thread.close()
    assert ran == ["trimtab-callbacks"]
