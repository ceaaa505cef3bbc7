"""A placement plan as a table for the terminal."""

from __future__ import annotations

from typing import Any, cast

from rich.console import Group, RenderableType
from rich.table import Table

from trimtab.core.plan import Plan


def plan_table(plan: Plan) -> RenderableType:
    """The choices with the chosen one marked, and how far each kind of group spreads."""
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
    return Group(choices, "", groups)
