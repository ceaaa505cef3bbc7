"""A real ``vllm serve`` as a context manager: started, waited for, and gone afterwards."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.error import URLError
from urllib.request import urlopen

from trimtab.core.errors import BadInput, TrimtabError
from trimtab.hosts.vllm.model_check import check_model

HOST = "127.0.0.1"

READY_WITHIN_S = 300.0
STOPS_WITHIN_S = 10.0

SMALL_CPU_ENGINE = (
    *("--max-model-len", "1024"),
    *("--kv-cache-memory-bytes", str(256 * 2**20)),
    "--enforce-eager",
)
"""Arguments that fit the small model on a machine with two cores and little memory; compiling it
would take minutes there."""

_LIKELY_CAUSES = ("Error", "error:", "Exception", "Killed")


def small_cpu_environment() -> dict[str, str]:
    """The environment of such a server; what the user has set stays.

    One core is left to the clients and the API server: threads of one parallel section that must
    share a core wait for each other, and a step then takes many times as long.
    """
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) - 1)),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_PLUGINS": "trimtab",
    }
    return {**defaults, **{name: os.environ[name] for name in defaults if name in os.environ}}


class ServerFailed(TrimtabError):
    """The server ended by itself, or never became ready."""


@dataclass(slots=True)
class Server:
    """A vLLM server for the length of a ``with`` block; no process of it outlives the block.

    The server runs in a process group of its own. A watchdog in that group kills it when this
    process dies in a way that runs no Python, such as SIGKILL.

    Args:
        model: a folder with a Hugging Face model, or a model's name.
        log: file that takes what the server prints.
        arguments: further arguments of ``vllm serve``.
        environment: variables set for the server over this process's own.
        port: port to listen on; 0 takes a free one.
        served_name: the model's name in the API.
    """

    model: Path | str
    log: Path
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    served_name: str = "model"
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _cleanup: ExitStack = field(default_factory=ExitStack, init=False, repr=False)

    def __enter__(self) -> Self:
        """Starts the server; returns at once, see `wait_ready`.

        Raises:
            BadInput: the port is taken, or there is no such model.
        """
        check_model(self.model, self.environment)
        self.port = free_port(self.port)
        with ExitStack() as starting:
            group = _start_watchdog(starting)
            log = starting.enter_context(self.log.open("wb"))
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                process_group=group,
            )
            starting.callback(self._stop)
            self._cleanup = starting.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()
        if self._process is not None:
            self._process.wait()

    def command(self) -> list[str]:
        """The command line.

        The ``vllm`` script is not used, since vllm-cpu ships a broken one; without ``-P``, folders
        of the current directory would hide packages of their names.
        """
        return [
            *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(self.model), "--served-model-name", self.served_name),
            *("--host", HOST, "--port", str(self.port)),
            *self.arguments,
        ]

    @property
    def url(self) -> str:
        """The address of the server, without a path."""
        return f"http://{HOST}:{self.port}"

    def wait_ready(
        self, within_s: float = READY_WITHIN_S, waiting: Callable[[], None] = lambda: None
    ) -> Self:
        """Returns once the server answers on ``/health``.

        Args:
            within_s: how long to wait at most.
            waiting: called a few times a second.

        Raises:
            ServerFailed: the server ended, or is not ready in time.
        """
        give_up_s = time.monotonic() + within_s
        while not self._healthy():
            self.check()
            if time.monotonic() > give_up_s:
                raise ServerFailed(
                    f"the vLLM server was not ready within {within_s:.0f} s; its log is {self.log}"
                )
            waiting()
            time.sleep(0.2)
        return self

    def check(self) -> None:
        """Does nothing while the server lives.

        Raises:
            ServerFailed: it has ended; the message holds the likely cause from its log.
        """
        status = self._process.poll() if self._process else None
        if status is not None:
            raise ServerFailed(
                f"the vLLM server ended with status {status}: {self.likely_cause()} "
                f"(the whole log: {self.log})"
            )

    def likely_cause(self, lines: int = 3) -> str:
        """The log's last lines that speak of an error, else its last lines."""
        with suppress(OSError):
            text = self.log.read_text(errors="replace").splitlines()
            filled = [line.strip() for line in text if line.strip()]
            causes = [line for line in filled if any(word in line for word in _LIKELY_CAUSES)]
            return " / ".join((causes or filled)[-lines:])[-800:] or "it printed nothing"
        return "its log cannot be read"

    def _healthy(self) -> bool:
        try:
            with urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def _stop(self) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOPS_WITHIN_S)


@contextmanager
def running(
    servers: Sequence[Server], waiting: Callable[[], None] = lambda: None
) -> Iterator[Sequence[Server]]:
    """Starts servers, all at once, and yields them when every one is ready.

    Args:
        servers: not started yet.
        waiting: called a few times a second until they are ready.

    Raises:
        BadInput: a port is taken, or there is no such model.
        ServerFailed: a server ended, or was not ready in time.
    """

    def look() -> None:
        for server in servers:
            server.check()
        waiting()

    with ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        for server in servers:
            server.wait_ready(waiting=look)
        yield servers


_given: set[int] = set()


def free_port(port: int = 0) -> int:
    """The port itself if it is free; for 0, one that is and was not given before.

    vLLM binds with SO_REUSEPORT, so that two servers on a port would share its requests unnoticed.

    Raises:
        BadInput: the port is taken, out of range, or not ours to take.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Without it a port whose last connections linger in TIME_WAIT would count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OverflowError:
            raise BadInput(f"port {port} is out of range", fix="give one from 0 to 65535") from None
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "is taken by another process" if taken else f"cannot be used ({error.strerror})"
            raise BadInput(f"port {port} {why}", fix="give another, or 0 for a free one") from None
        chosen: int = probe.getsockname()[1]
    if port == 0 and chosen in _given:
        return free_port()
    _given.add(chosen)
    return chosen


def _start_watchdog(cleanup: ExitStack) -> int:
    """Starts the leader of a process group that ends, with all its processes, when we do.

    Its standard input is a pipe that only this process holds open: when it closes, for whatever
    reason, the watchdog kills its group.

    Returns:
        The group's id.
    """
    watchdog = subprocess.Popen(
        ["/bin/sh", "-c", "trap '' HUP INT TERM; cat >/dev/null; kill -KILL 0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )

    def kill_group() -> None:
        # The leader is not reaped yet, so the number cannot belong to anybody else.
        with suppress(ProcessLookupError):
            os.killpg(watchdog.pid, signal.SIGKILL)
        watchdog.communicate()

    cleanup.callback(kill_group)
    return watchdog.pid
