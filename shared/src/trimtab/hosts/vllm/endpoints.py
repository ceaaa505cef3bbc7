"""The endpoint plugin: trimtab's routes on vLLM's server, where ``VLLM_PLUGINS`` names it."""

from __future__ import annotations

from argparse import Namespace
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI

from trimtab.core.hooks import discover
from trimtab.hosts.vllm import options
from trimtab.hosts.vllm.middleware import Middleware


class TrimtabEndpoints:
    """Adds ``GET /trimtab/status`` and the middleware that reads call fields."""

    name = "trimtab"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Registers the route and the middleware (which a ``--middleware`` flag may repeat)."""
        app.add_middleware(Middleware)

        @app.get("/trimtab/status")
        async def status() -> dict[str, Any]:
            return dict(getattr(app.state, "trimtab_status", {}))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Notes what this server runs with; the answer of the status route."""
        switched_on = options.enabled(getattr(args, "additional_config", {}))
        state.trimtab_status = {
            "version": version("trimtab-core"),
            "scheduler_cls": str(getattr(args, "scheduler_cls", None)),
            "plugins": {
                found.name: {
                    "enabled": found.name in switched_on,
                    "options": switched_on.get(found.name),
                }
                for found in discover()[0]
            },
        }
