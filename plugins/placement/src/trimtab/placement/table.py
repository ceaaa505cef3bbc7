"""A placement plan as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from rich.console import Group, RenderableType
from rich.table import Table

from trimtab.core.plan import Plan


def plan_table(plan: Plan) -> RenderableType:
    """The choices with the chosen one marked, how far groups spread, and what they send."""
    details = cast(dict[str, Any], plan.details)
    proof = "proven optimal" if plan.objective.status == "optimal" else "not proven optimal"
    title = f"weighted spread {plan.objective.value:.4g}, bound {plan.objective.bound:.4g}: {proof}"
    choices = Table("", "pipeline", "data", "weighted", "how", title=title, box=None)
    spread = (plan.expected["pipeline_spread"].value, plan.expected["data_spread"].value)
    for point in details["front"]:
        mark = "→" if (point["pipeline"], point["data"]) == spread else ""
        choices.add_row(
            mark,
            str(point["pipeline"]),
            str(point["data"]),
            f"{point['weighted']:.4g}",
            point["method"],
        )
    groups = Table("groups", title="most domains that a group touches (mean)", box=None)
    for tier in details["tiers"]:
        groups.add_column(tier, justify="right")
    kinds: dict[str, object] = next(iter(details["tiers"].values()), {})
    for kind in kinds:
        cells = (tier[kind] for tier in details["tiers"].values())
        groups.add_row(kind, *(f"{c['widest']} ({c['mean']:.2f})" for c in cells))
    return Group(choices, "", groups, "", *_communication(details))


def _communication(details: Mapping[str, Any]) -> list[RenderableType]:
    """The weight and its origin, and the bytes of a step; as far as the plan knows them."""
    facts = details.get("communication")
    if facts is None:
        return []
    weight = f"alpha {round(details['alpha'], 3):g}: {facts['alpha_from']}"
    if facts["volumes"] is None:
        return [weight, "bytes are not known: the job gives no model, shape or volumes"]
    sent = Table("groups", title="bytes of a step", box=None)
    sent.add_column("a rank sends", justify="right")
    for tier in facts["crossing"]:
        sent.add_column(f"leave a {tier}, by hostname", justify="right")
        sent.add_column("by the plan", justify="right")
    for kind, sent_bytes in facts["volumes"].items():
        if not sent_bytes:
            continue
        cells = [shown_bytes(sent_bytes)]
        for kinds in facts["crossing"].values():
            crossing = kinds.get(kind, {"before": 0.0, "after": 0.0})
            cells += [shown_bytes(crossing["before"]), shown_bytes(crossing["after"])]
        sent.add_row(kind.replace("_", " "), *cells)
    return [sent, "", weight]


def shown_bytes(count: float) -> str:
    """Bytes with three figures and a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T"):
        # What would be rounded up to a thousand has the next prefix.
        if count < 999.5:
            return f"{count:.3g} {prefix}B"
        count /= 1000
    return f"{count:,.0f} PB" if count >= 999.5 else f"{count:.3g} PB"
