"""The live page, and the state that it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from trimtab.urgency.router.admission import AdmissionQueue, Ticket
from trimtab.urgency.router.backends import Backend
from trimtab.urgency.router.speeds import Speeds
from trimtab.urgency.router.tenants import Tenant

_MOST_ROWS = 50


@cache
def html() -> str:
    """The page, which asks for the state every second."""
    return files(__package__).joinpath("page.html").read_text(encoding="utf-8")


def state(
    queue: AdmissionQueue,
    backends: Sequence[Backend],
    speeds: Speeds,
    now_s: float,
    tenant: Tenant | None,
) -> dict[str, Any]:
    """Who waits, who is late, and which server does what; at most 50 calls in each list.

    Args:
        queue: the calls that wait.
        backends: all servers.
        speeds: what is known of them.
        now_s: the present.
        tenant: whose calls are shown; None for everybody's.
    """
    mine = [t for t in queue.waiting if tenant is None or t.tenant is tenant]
    return {
        "waiting_total": len(queue),
        "waiting": [_row(ticket, now_s) for ticket in mine[:_MOST_ROWS]],
        "late_total": sum(ticket.journey.deadline_s < now_s for ticket in mine),
        "servers": [_server(backend, speeds, now_s, tenant) for backend in backends],
    }


def _server(
    backend: Backend, speeds: Speeds, now_s: float, tenant: Tenant | None
) -> dict[str, Any]:
    known = speeds.table()
    running = [t for t in backend.tickets if tenant is None or t.tenant is tenant]
    queue = backend.queue
    return {
        "name": backend.name,
        "state": backend.state.value,
        "reason": backend.reason,
        "seats": backend.backlog.seats,
        "in_flight": backend.backlog.own,
        "running": queue.running if queue else None,
        "waiting": queue.waiting if queue else None,
        "calls": [_row(ticket, now_s) for ticket in running[:_MOST_ROWS]],
        "stages": [
            {
                "stage": stage,
                "first_token_ms_per_token": _ms(rates.prompt_s),
                "ms_per_token": _ms(rates.output_s),
                "tokens": round(rates.output_tokens.mean(), 1),
            }
            for (stage, number), rates in known.items()
            if stage is not None and number == backend.number
        ][:_MOST_ROWS],
    }


def _ms(window: Any) -> float | None:
    return round(1000 * window.mean(), 3) if len(window) else None


def _row(ticket: Ticket, now_s: float) -> dict[str, Any]:
    deadline_s = ticket.journey.deadline_s
    since_s = ticket.sent_s if ticket.backend is not None else ticket.call.arrival_s
    return {
        "tenant": ticket.tenant.name,
        "workflow": ticket.journey.name,
        "class": ticket.journey.class_,
        "stage": ticket.routed.stage,
        "for_s": round(now_s - since_s, 2),
        "left_s": round(deadline_s - now_s, 2) if math.isfinite(deadline_s) else None,
    }
