"""The report page of a plan of branches: one HTML file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from trimtab.branches.curves import curves_picture
from trimtab.core.documents import validate, write_atomic
from trimtab.core.errors import BadInput
from trimtab.core.plan import Plan
from trimtab.core.report_page import fact_boxes, filled

_LINES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Each of these M has a line of its own."""


class _Pair(BaseModel):
    """A point of the curves; None stands for an engine that does not keep up."""

    n: int
    m: int
    latency_s: float | None
    tokens: float
    kv_tokens: float | None
    accuracy: float
    utilisation: float | None


def write_report(plan: Plan, path: str | Path) -> None:
    """Writes the page of a plan, whole or not at all.

    Args:
        plan: of the planner ``branches``.
        path: of the HTML file.

    Raises:
        BadInput: the plan is another planner's, or the file cannot be written.
    """
    write_atomic(path, report_page(plan))


def report_page(plan: Plan) -> str:
    """The page of a plan as HTML; the argument and errors are those of `write_report`."""
    if plan.planner != "branches" or "curves" not in plan.details:
        raise BadInput(
            f"the plan is one of the planner {plan.planner!r}",
            fix="give a plan of trimtab plan branches",
        )
    pairs = validate(list[_Pair], plan.details["curves"], where="details.curves")
    config = cast(dict[str, int], plan.details["config"])
    best = next(p for p in pairs if (p.n, p.m) == (config["n"], config["m"]))
    return filled(
        "trimtab.branches",
        title=escape(f"Branches for {plan.details['slo']}"),
        subtitle=escape(
            f"{float(cast(Any, plan.details['rate_per_s'])):g} requests/s on one engine,"
            f" {plan.details['engine']}; made {plan.created:%Y-%m-%d %H:%M} UTC."
        ),
        facts=_facts(plan, config),
        warnings=_warnings(plan),
        config=escape(json.dumps({"trimtab": {"branches": config}})),
        latency=_over_n(pairs, best, "latency_s"),
        kv=_over_n(pairs, best, "kv_tokens", capacity=plan.details.get("kv_capacity_tokens")),
        tokens=_over_n(pairs, best, "tokens"),
        accuracy=_accuracy(pairs, best),
        table=_table(plan),
    )


def _facts(plan: Plan, config: dict[str, int]) -> str:
    figures = plan.expected
    return fact_boxes(
        [
            (str(config["n"]), "branches of a request (N)"),
            (str(config["m"]), "finished ones answer it (M)"),
            (str(config["score_every"]), "tokens between two scorings (T)"),
            (f"{figures['mean latency'].value:.3g} s", "mean latency, simulated"),
            (f"{figures['accuracy'].value:.3f}", "of the answers are right"),
            (f"{figures['utilisation'].value:.0%}", "of the KV cache or the seats in use"),
        ]
    )


def _warnings(plan: Plan) -> str:
    items = "".join(f"<li>{escape(warning)}</li>" for warning in plan.warnings)
    return f"<section><h2>Warnings</h2><ul>{items}</ul></section>" if items else ""


def _over_n(pairs: Sequence[_Pair], best: _Pair, figure: str, *, capacity: object = None) -> str:
    """A figure over N, a line for each M; and where it is bounded, the bound."""
    lines = {
        f"M = {m}": [
            (float(pair.n), value)
            for pair in pairs
            if pair.m == m and (value := getattr(pair, figure)) is not None
        ]
        for m in sorted({*_LINES, best.m})
    }
    if isinstance(capacity, int | float):
        lines["room"] = [(1.0, float(capacity)), (float(max(p.n for p in pairs)), float(capacity))]
    return curves_picture(
        {name: line for name, line in lines.items() if line},
        across="N",
        chosen=(float(best.n), getattr(best, figure)),
        chosen_line=f"M = {best.m}",
    )


def _accuracy(pairs: Sequence[_Pair], best: _Pair) -> str:
    """Accuracy over M: it does not depend on N."""
    line = sorted({pair.m: pair.accuracy for pair in pairs}.items())
    return curves_picture(
        {"": [(float(m), accuracy) for m, accuracy in line]},
        across="M",
        chosen=(float(best.m), best.accuracy),
        chosen_line="",
    )


def _table(plan: Plan) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{figure.value:.4g}</td><td>{escape(figure.unit)}</td></tr>"
        for name, figure in plan.expected.items()
    )
    return f"<table><tr><th>figure</th><th>value</th><th>unit</th></tr>{rows}</table>"
