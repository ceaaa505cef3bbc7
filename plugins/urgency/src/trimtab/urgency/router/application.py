"""The router put together: its own routes, the proxy behind them, and what runs beside."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from trimtab.core.errors import BadInput, TrimtabError
from trimtab.urgency.dispatch import rule
from trimtab.urgency.policy import UrgencyPolicy
from trimtab.urgency.router import page
from trimtab.urgency.router.admission import AdmissionQueue
from trimtab.urgency.router.backends import Backend, Queue, State, keep_looking, look_once
from trimtab.urgency.router.config import RouterConfig
from trimtab.urgency.router.forwarding import Proxy
from trimtab.urgency.router.journeys import Journeys
from trimtab.urgency.router.metrics import Metrics
from trimtab.urgency.router.refusals import Refusal
from trimtab.urgency.router.speeds import Speeds
from trimtab.urgency.router.tenants import Tenant, Tenants
from trimtab.urgency.router.upstream import Upstream
from trimtab.urgency.tuned import TunedFile

logger = logging.getLogger(__name__)

_QUIET_S = 30.0
"""A workflow without calls for so long counts as over, in the metrics."""
_TICK_S = 0.1
_STOPS_WITHIN_S = 10
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
)


class Router:
    """All parts of a running router.

    Args:
        config: its options.
        clock: seconds that never go back.
    """

    def __init__(self, config: RouterConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._speeds = Speeds()
        self._metrics = Metrics()
        self._tuned = TunedFile(config.urgency.tuned) if config.urgency.tuned else None
        self._tenants = Tenants(config.tenants)
        self._journeys = Journeys(_QUIET_S, self._metrics.workflow_ended)
        self._upstream = Upstream()
        self.backends = [
            Backend(options, number, config.health, self._speeds)
            for number, options in enumerate(config.backends)
        ]
        self.queue = AdmissionQueue(
            UrgencyPolicy(config.urgency),
            config.dispatch.make(),
            self.backends,
            self._tenants.all,
            config.limits,
            clock,
        )
        self.proxy = Proxy(
            self.queue,
            self.backends,
            self._upstream,
            self._tenants,
            self._journeys,
            self._speeds,
            self._metrics,
            config.limits,
            clock,
        )

    def application(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._show_metrics),
                Route("/trimtab", self._page),
                Route("/trimtab/state", self._state),
                Mount("/", self.proxy),
            ],
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._upstream)
            await asyncio.gather(*(look_once(backend, self._look) for backend in self.backends))
            watchers = [
                asyncio.create_task(keep_looking(backend, self._look, self.queue.pump))
                for backend in self.backends
            ]
            for task in (*watchers, asyncio.create_task(self._tick())):
                stack.push_async_callback(_cancelled, task)
            yield

    async def _look(self, backend: Backend) -> Queue | None:
        return await self._upstream.look(backend, self._config.health.timeout_s)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._follow_tuned()
            self.queue.tick()
            self._journeys.close_quiet(self._clock())

    def _follow_tuned(self) -> None:
        """Takes the dispatch rule over that a tuner has written meanwhile."""
        now_s = self._clock()
        if self._tuned is None or now_s < self._tuned.due_s:
            return
        found = self._tuned.changed(now_s)
        if found is None or found.dispatch is None:
            return
        alpha = found.dispatch.alpha
        options = {} if alpha is None else {"alpha": alpha}
        try:
            self.queue.rule = rule(found.dispatch.rule, **options)
        except BadInput as error:
            logger.warning("the dispatch rule stays as it is: %s", error)

    async def _health(self, request: Request) -> Response:
        """200 while a server is up."""
        up = any(backend.state is not State.DOWN for backend in self.backends)
        return PlainTextResponse("" if up else "no server is up\n", 200 if up else 503)

    async def _show_metrics(self, request: Request) -> Response:
        text = self._metrics.text(self._tenants.all, self.backends)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(page.html(), headers={"content-security-policy": _PAGE_POLICY})

    async def _state(self, request: Request) -> Response:
        """What the page shows; a tenant sees its own calls."""
        try:
            tenant: Tenant | None = self._tenants.of(dict(request.headers))
        except Refusal as refusal:
            headers = {k.decode(): v.decode() for k, v in refusal.headers()}
            return Response(refusal.detail(), refusal.status, headers)
        if not self._tenants.have_keys:
            tenant = None
        shown = page.state(self.queue, self.backends, self._speeds, self._clock(), tenant)
        return JSONResponse(shown)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@asynccontextmanager
async def serving(
    router: Router, config: RouterConfig, port: int
) -> AsyncIterator[tuple[str, asyncio.Task[None]]]:
    """A router that listens for as long as the block lasts.

    Args:
        router: what is served.
        config: its options.
        port: where it listens; 0 for a free port.

    Yields:
        Its address, and a task that ends when a signal has ended the router.
    """
    http = _server(router, config, port)
    task = asyncio.create_task(http.serve())
    try:
        while not http.started and not task.done():
            await asyncio.sleep(0.005)
        if task.done():
            task.result()
            raise TrimtabError(f"the router could not listen on {config.host}:{port}")
        host, bound = http.servers[0].sockets[0].getsockname()[:2]
        yield f"http://{f'[{host}]' if ':' in host else host}:{bound}", task
    finally:
        http.should_exit = True
        await asyncio.wait({task})


def _server(router: Router, config: RouterConfig, port: int) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            router.application(),
            host=config.host,
            port=port,
            access_log=False,
            log_level=config.log_level,
            server_header=False,
            date_header=False,
            lifespan="on",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_STOPS_WITHIN_S,
            backlog=4096,
        )
    )
