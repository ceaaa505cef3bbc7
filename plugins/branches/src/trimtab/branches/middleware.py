"""``vllm serve --middleware trimtab.branches.Middleware``: one answer of many branches."""

from __future__ import annotations

import json

from trimtab.branches.asked import Asked, for_engine, needs_ids, what_is_asked
from trimtab.branches.config import BranchesConfig
from trimtab.branches.late_scores import LateScores
from trimtab.branches.streaming import StreamedResponse
from trimtab.branches.whole import WholeResponse
from trimtab.core.documents import validate
from trimtab.core.errors import BadInput
from trimtab.core.policy import FIELD_PREFIX
from trimtab.hosts.vllm import options
from trimtab.hosts.vllm.engine_view import EngineView
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
        self._late: LateScores | None = None

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
            await refuse(send, error)
            return
        if asked is None:
            await self._app(scope, replay, send)
            return
        changed = json.dumps(for_engine(content, asked)).encode()
        scope, receive = with_body(scope, receive, changed)
        late = self._late_scores(scope) if asked.scored_late and not content.get("echo") else None
        response = _response(send, asked, content, late)
        try:
            await self._app(scope, receive, response)
        finally:
            await response.close()

    def _late_scores(self, scope: Scope) -> LateScores | None:
        """What asks for scores that the engine could not wait for, with the server's tokenizer."""
        if self._late is None:
            state = getattr(scope.get("app"), "state", None)
            model = getattr(getattr(state, "vllm_config", None), "model_config", None)
            if model is None:
                return None
            decode = EngineView(model, by_priority=False).decode
            self._late = LateScores.of(self._options(scope), decode)
        return self._late

    def _options(self, scope: Scope) -> BranchesConfig:
        if self._config is None:
            said = options.enabled(additional_config(scope)).get("branches") or {}
            where = "--additional-config, trimtab.branches"
            self._config = validate(BranchesConfig, said, where=where)
        return self._config


def _response(
    send: Send, asked: Asked, content: dict[str, object], late: LateScores | None
) -> StreamedResponse | WholeResponse:
    hide_ids = needs_ids(content, asked)
    if not content.get("stream"):
        return WholeResponse(send, asked, hide_ids=hide_ids, late=late)
    given = content.get("stream_options")
    options = given if isinstance(given, dict) else {}
    return StreamedResponse(send, asked, options, hide_ids=hide_ids, late=late)
