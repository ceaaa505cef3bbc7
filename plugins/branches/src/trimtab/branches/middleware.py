"""``vllm serve --middleware trimtab.branches.Middleware``: one answer of many branches."""

from __future__ import annotations

import json

from trimtab.branches.asked import Asked, counts_by_ids, for_engine, what_is_asked
from trimtab.branches.config import BranchesConfig
from trimtab.branches.streaming import StreamedResponse
from trimtab.branches.whole import WholeResponse
from trimtab.core.documents import validate
from trimtab.core.errors import BadInput
from trimtab.core.policy import FIELD_PREFIX
from trimtab.hosts.vllm import options
from trimtab.hosts.vllm.middleware import (
    App,
    Receive,
    Scope,
    Send,
    additional_config,
    generates,
    json_object,
    read_body,
    refuse,
    with_body,
)

PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
"""The routes whose JSON body takes ``n``."""

_MARK = FIELD_PREFIX.encode()
_SEEN = "trimtab.branches"


class Middleware:
    """Launches the branches that a request asks for, and answers with the best of them.

    The request goes to the server with ``n`` branches, which the plugin's policy ends in the
    engine; of the choices that come back the client gets one (or all, with their fates). A request
    that asks for no branches passes unparsed, and so does its response.

    Args:
        app: the server behind it.
        config: the options; by default those of the server's ``--additional-config``.
    """

    def __init__(self, app: App, config: BranchesConfig | None = None) -> None:
        self._app = app
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request, as ASGI has it."""
        if not generates(scope) or scope["path"].rstrip("/") not in PATHS or scope.get(_SEEN):
            await self._app(scope, receive, send)
            return
        scope[_SEEN] = True
        config = self._options(scope)
        body, replay = await read_body(receive)
        content = json_object(body) if config.n is not None or _MARK in (body or b"") else None
        if content is None:
            await self._app(scope, replay, send)
            return
        try:
            asked = what_is_asked(content, config)
        except BadInput as error:
            await refuse(send, error, error.where)
            return
        if asked is None:
            await self._app(scope, replay, send)
            return
        changed = json.dumps(for_engine(content, asked)).encode()
        scope, receive = with_body(scope, receive, changed)
        await self._app(scope, receive, _response(send, asked, content))

    def _options(self, scope: Scope) -> BranchesConfig:
        if self._config is None:
            said = options.enabled(additional_config(scope)).get("branches") or {}
            where = "--additional-config, trimtab.branches"
            self._config = validate(BranchesConfig, said, where=where)
        return self._config


def _response(
    send: Send, asked: Asked, content: dict[str, object]
) -> StreamedResponse | WholeResponse:
    if not content.get("stream"):
        return WholeResponse(send, asked, hide_ids=counts_by_ids(content))
    given = content.get("stream_options")
    return StreamedResponse(send, asked, given if isinstance(given, dict) else {})
