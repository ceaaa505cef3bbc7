"""The commands ``trimtab route`` and ``trimtab up``: their options, and the servers' lives."""

from __future__ import annotations

import asyncio
import gc
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from trimtab.core.documents import read_yaml, validate
from trimtab.core.errors import BadInput

if TYPE_CHECKING:
    from trimtab.hosts.vllm.server import Server
    from trimtab.urgency.router.config import BackendOptions, RouterConfig, ServerOptions

_NEEDED = ("aiohttp", "prometheus_client", "starlette", "uvicorn")
_CHECK_EVERY_S = 1.0


def route(
    backend: list[str] = typer.Option(
        [], metavar="URL", help="A server that runs already; give the option once for each."
    ),
    config: Path | None = typer.Option(None, help="A file with the router's options."),
    host: str | None = typer.Option(None, help="The address to listen on; 127.0.0.1 by default."),
    port: int | None = typer.Option(
        None, min=0, max=65_535, help="The port to listen on; 8080 by default, 0 for a free one."
    ),
) -> None:
    """Route calls to OpenAI-compatible servers that run already, by the workflows' deadlines."""
    _check_packages()
    options = _options(config, host=host, port=port, backends=backend)
    if options.servers and config is not None:
        raise BadInput(
            "the file names servers to start",
            where=f"{config}, servers",
            fix="run `trimtab up` with it, or leave them out",
        )
    if not options.backends:
        raise BadInput("no server is given", fix="add --backend http://HOST:PORT for each")
    _run(options, lambda: None)


def up(
    config: Path = typer.Argument(help="A file with the servers and the router's options."),
    host: str | None = typer.Option(None, help="The address to listen on, over the file's."),
    port: int | None = typer.Option(
        None, min=0, max=65_535, help="The port to listen on, over the file's; 0 for a free one."
    ),
    logs: Path | None = typer.Option(None, help="A folder for the servers' logs."),
) -> None:
    """Start the vLLM servers that a file names, and route calls to them; all end together."""
    _check_packages()
    options = _options(config, host=host, port=port)
    if not options.servers:
        raise BadInput(
            "the file names no servers to start",
            where=str(config),
            fix="add `servers`, or run `trimtab route` for those that run already",
        )
    if logs is not None and not logs.is_dir():
        raise BadInput("there is no such folder", where=str(logs), fix="make it first")
    from trimtab.core.progress import progress_bar
    from trimtab.hosts.vllm.server import running

    with _ended_by_signals(), _log_folder(logs) as folder, ExitStack() as stack:
        names = ", ".join(server.name for server in options.servers)
        with progress_bar() as progress:
            say = partial(progress, f"starting {names}; their logs are in {folder}")
            started = stack.enter_context(running(_servers(options.servers, folder), say))
        backends = [backend_of(s, o) for s, o in zip(started, options.servers, strict=True)]
        routed = options.model_copy(update={"backends": (*options.backends, *backends)})
        _run(routed, _Supervisor(started, options.servers).check)


@contextmanager
def _log_folder(given: Path | None) -> Iterator[Path]:
    """The folder of the servers' logs; one of our own stays only where a failure can be read."""
    if given is not None:
        yield given
        return
    folder = Path(tempfile.mkdtemp(prefix="trimtab-up-"))
    kept = False
    try:
        yield folder
    except Exception:
        kept = any(folder.iterdir())
        raise
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def _check_packages() -> None:
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        raise BadInput(
            f"the router needs the package {missing[0]!r}, which is not installed",
            fix="install trimtab-urgency[router] beside trimtab",
        )


def _options(
    config: Path | None, *, host: str | None, port: int | None, backends: list[str] | None = None
) -> RouterConfig:
    """The file's options, with those of the command line over them."""
    from trimtab.urgency.router.config import BackendOptions, RouterConfig

    found = read_yaml(config, RouterConfig) if config is not None else RouterConfig()
    data = found.model_dump(exclude_unset=True)
    data |= {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    for url in backends or []:
        validate(BackendOptions, {"url": url}, where="--backend")
        data["backends"] = [*data.get("backends", []), {"url": url}]
    return validate(RouterConfig, data, where=str(config) if config else "--backend")


def _servers(options: Sequence[ServerOptions], logs: Path) -> list[Server]:
    from trimtab.hosts.vllm.server import Server

    return [
        Server(
            one.model,
            logs / f"{one.name}.log",
            one.arguments,
            one.environment,
            port=one.port,
            served_name=one.served_name,
        )
        for one in options
    ]


def backend_of(server: Server, options: ServerOptions) -> BackendOptions:
    """A server that was started, as one to route to."""
    from trimtab.urgency.router.config import BackendOptions

    seats = options.seats if options.seats is not None else _seats_in(options.arguments)
    return BackendOptions(url=server.url, name=options.name, seats=seats)


def _seats_in(arguments: tuple[str, ...]) -> int | None:
    """The batch's size as vLLM's own flag gives it."""
    for flag, value in pairwise((*arguments, "")):
        name, _, joined = flag.partition("=")
        given = joined or value
        if name == "--max-num-seqs" and given.isdigit() and int(given):
            return int(given)
    return None


class _Supervisor:
    """Says which server has ended, and ends all when none is left."""

    def __init__(self, servers: Sequence[Server], options: tuple[ServerOptions, ...]) -> None:
        self._living = dict(zip((o.name for o in options), servers, strict=True))

    def check(self) -> None:
        """Looks at all servers.

        Raises:
            ServerFailed: the last one has ended.
        """
        from trimtab.hosts.vllm.server import ServerFailed

        for name, server in list(self._living.items()):
            try:
                server.check()
            except ServerFailed as failure:
                del self._living[name]
                if not self._living:
                    raise
                print(f"{name}: {failure}; the others go on", file=sys.stderr, flush=True)


def _run(options: RouterConfig, check: Callable[[], None]) -> None:
    """Routes until a signal ends it, or a check fails."""
    from trimtab.hosts.vllm.server import free_port
    from trimtab.urgency.router.application import Router, serving

    port = options.port if options.port == 0 else free_port(options.port)

    async def serve() -> None:
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, signal.raise_signal, signal.SIGTERM)
        async with serving(Router(options), options, port) as (url, ended):
            count = len(options.backends)
            text = f"routing to {count} servers at {url}; its page is {url}/trimtab"
            print(text, file=sys.stderr, flush=True)
            # What is here stays: to look through it again and again would make calls wait.
            gc.collect()
            gc.freeze()
            while not ended.done():
                await asyncio.wait({ended}, timeout=_CHECK_EVERY_S)
                check()

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The event loop of uvloop where it is installed, as beside vLLM: it is the faster one."""
    if find_spec("uvloop") is None:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = import_module("uvloop").new_event_loop
    return factory


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into an orderly end, so that the servers are stopped."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    heeded = [number for number in numbers if before[number] is not signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])
