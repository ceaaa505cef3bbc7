"""Calls of a planned group: what their callers wait for, and the threads that run them."""

from __future__ import annotations

import atexit
import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

_STOP = None


class Callbacks:
    """Runs what follows futures, in one thread and in the order of the calls.

    The thread that runs calls never waits for it, so that a callback may make calls itself. The
    thread begins with the first future.
    """

    def __init__(self) -> None:
        self._due: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._changing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def put(self, what: Callable[[], None]) -> None:
        """Does something behind all else; at once in a callback, and where the thread has ended."""
        if self.runs_here():
            what()
            return
        with self._changing:
            if not self._closed:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._run, name="trimtab-callbacks", daemon=True
                    )
                    self._thread.start()
                self._due.put(what)
                return
        what()

    def runs_here(self) -> bool:
        """Whether a callback of this group makes the call."""
        return self._thread is not None and threading.current_thread() is self._thread

    def run_until(self, over: Callable[[], bool]) -> None:
        """In a callback: does what is due, for which it would wait in vain."""
        while self.runs_here() and not over():
            what = self._due.get()
            if what is _STOP:
                self._due.put(_STOP)
                return
            what()

    def close(self, *, wait: bool) -> None:
        """Ends the thread behind the futures that were given.

        Args:
            wait: until it has ended; a callback that closes its own group does not.
        """
        with self._changing:
            self._closed = True
        self._due.put(_STOP)
        if wait and self._thread is not None and not self.runs_here():
            self._thread.join()

    def _run(self) -> None:
        while (what := self._due.get()) is not _STOP:
            what()
            del what


class _Future(torch.futures.Future[list[torch.Tensor]]):
    """A call's future, whose callbacks run in one thread even where it is over before they come.

    Were they run by whoever adds them, their calls would come in another order on another rank.
    """

    def __init__(self, callbacks: Callbacks) -> None:
        super().__init__()
        self._callbacks = callbacks

    def wait(self) -> list[torch.Tensor]:
        self._callbacks.run_until(self.done)
        return super().wait()

    def then(self, callback: Callable[[Any], Any]) -> Any:
        gate: torch.futures.Future[None] = torch.futures.Future()
        following = gate.then(lambda _: callback(self))
        self._opens(gate)
        return following

    def add_done_callback(self, callback: Callable[[Any], Any]) -> None:
        gate: torch.futures.Future[None] = torch.futures.Future()
        gate.add_done_callback(lambda _: callback(self))
        self._opens(gate)

    def _opens(self, gate: torch.futures.Future[None]) -> None:
        """Lets what follows a gate run; were it added later, it might run in this thread."""
        super().add_done_callback(lambda _: self._callbacks.put(partial(gate.set_result, None)))


class PlannedWork(dist.Work):
    """A call that runs on the group's thread, or ran on the caller's.

    Args:
        result: the tensors that the call fills.
        callbacks: settles its future.
    """

    def __init__(self, result: list[torch.Tensor], callbacks: Callbacks) -> None:
        super().__init__()
        self._result, self._callbacks = result, callbacks
        self._done = False
        # Held until the call is over; most are when anyone waits, and a threading.Event is dear.
        self._running = threading.Lock()
        self._running.acquire()
        self._error: Exception | None = None
        self._future: torch.futures.Future[list[torch.Tensor]] | None = None
        self._settling = threading.Lock()

    def finish(self, error: Exception | None = None) -> None:
        """Says that the call is over."""
        with self._settling:
            self._error, self._done = error, True
            self._running.release()
            future = self._future
        if future is not None:
            self._callbacks.put(partial(self._settle, future))

    def _settle(self, future: torch.futures.Future[list[torch.Tensor]]) -> None:
        if self._error is None:
            future.set_result(self._result)
        else:
            future.set_exception(self._error)  # type: ignore[arg-type]

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if not self._done:
            limit_s = timeout.total_seconds()
            if not self._running.acquire(timeout=limit_s if limit_s > 0 else -1):
                raise RuntimeError(f"the collective is not done after {limit_s:g} s")
            self._running.release()
        if self._error is not None:
            raise self._error
        return True

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        # Made when it is first asked for: most calls are only waited for.
        with self._settling:
            if self._future is not None:
                return self._future
            made = self._future = _Future(self._callbacks)
            over = self._done
        if over:
            self._settle(made)
        return made

    def is_completed(self) -> bool:
        return self._done

    def is_success(self) -> bool:
        return self._done and self._error is None

    def exception(self) -> Exception | None:
        return self._error

    def result(self) -> list[torch.Tensor]:
        return self._result

    def synchronize(self) -> None:
        self.wait()


class Several(dist.Work):
    """Calls that are one to the caller."""

    def __init__(self, works: Sequence[Any]) -> None:
        super().__init__()
        self._works = list(works)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        limit = [timeout] if timeout > timedelta(0) else []
        done = [work.wait(*limit) for work in self._works]
        return all(done)

    def get_future(self) -> Any:
        together = torch.futures.collect_all([work.get_future() for work in self._works])
        return together.then(lambda done: [t for each in done.value() for t in each.value() or ()])

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


class CallThread:
    """Runs calls one after the other, each with its number.

    Attributes:
        callbacks: of the calls' futures.
    """

    def __init__(self) -> None:
        self.callbacks = Callbacks()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._given = itertools.count(1)
        self._ahead = 0
        self._order, self._running = threading.Lock(), threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="trimtab-plans", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, call: Callable[[int], None], *, here: bool) -> None:
        """Runs a call behind all others.

        Args:
            call: gets a number of its own, in the order of the calls.
            here: whether it may run at once in the caller's thread, which waits for it anyway; it
                does where no call is ahead of it.

        Raises:
            RuntimeError: the thread has ended.
        """
        with self._order:
            number = next(self._given)
            at_once = here and self._ahead == 0 and self._running.acquire(blocking=False)
            if not at_once:
                if self._closed:
                    raise RuntimeError("the process group was destroyed, and takes no more calls")
                self._ahead += 1
                self._calls.put(partial(call, number))
        if at_once:
            try:
                call(number)
            finally:
                self._running.release()

    def close(self) -> None:
        """Ends both threads behind the calls that were given; they hold no tensor after that.

        Callbacks may make calls until the last of them is over.
        """
        atexit.unregister(self.close)
        own = threading.current_thread() is self._thread
        if not self._closed and not own:
            over = threading.Event()
            self.submit(lambda number: over.set(), here=False)
            over.wait()
        self.callbacks.close(wait=not own)
        with self._order:
            self._closed = True
            self._calls.put(_STOP)
        if not own:
            self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not _STOP:
            with self._running:
                call()
            del call
            with self._order:
                self._ahead -= 1
