"""The report page of a plan: one HTML file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, cast

import numpy as np

from trimtab.core.cluster import Cluster
from trimtab.core.documents import validate
from trimtab.core.errors import BadInput
from trimtab.core.plan import Plan
from trimtab.core.report_page import fact_boxes, filled
from trimtab.placement.fabric import Fabric
from trimtab.placement.job import TrainingJob
from trimtab.placement.layout import HostGrid
from trimtab.placement.report_pictures import (
    Cell,
    between_picture,
    colours,
    front_picture,
    matrix,
    tree_picture,
)
from trimtab.placement.summary import group_spreads
from trimtab.placement.table import shown_bytes
from trimtab.placement.traffic import Traffic, traffic
from trimtab.placement.volumes import Volumes

_MOST_PAIRWISE_RANKS = 20_000
"""Spreads of every kind of group are counted anew for jobs of at most so many ranks."""


@dataclass(frozen=True, slots=True)
class _Shown:
    """A plan as the page needs it.

    Attributes:
        after, before: the nodes of the grid, by the plan and by their hostnames.
        domain_of: the domain of each node in the tier that the plan is about.
        colour: of each domain.
        volumes: what a rank sends; None where the job gives no model.
        moved: by hostname and by the plan, what goes between domains; None without volumes.
    """

    plan: Plan
    job: TrainingJob
    fabric: Fabric
    tier: int
    after: HostGrid
    before: HostGrid
    domain_of: Mapping[str, str]
    colour: Mapping[str, str]
    volumes: Volumes | None
    moved: tuple[Traffic, Traffic] | None

    @property
    def tier_name(self) -> str:
        return self.fabric.tiers[self.tier] if self.fabric.tiers else "network"


def report_page(plan: Plan, cluster: Cluster) -> str:
    """The page of a plan as HTML.

    Args:
        plan: a plan of the placement planner.
        cluster: the cluster it was made for.

    Raises:
        BadInput: the plan is another planner's, or its nodes are not the cluster's.
    """
    shown = _shown(plan, cluster)
    return filled(
        "trimtab.placement",
        title=escape(f"Placement of {shown.job.name} on {cluster.name}"),
        subtitle=escape(_subtitle(shown)),
        facts=_facts(shown),
        warnings=_warnings(plan),
        domains=escape(_plural(shown.tier_name)),
        matrices=_matrices(shown),
        legend=_legend(shown),
        traffic_caption=escape(_traffic_caption(shown)),
        between=_between(shown),
        volumes=_volume_table(shown),
        network_caption=escape(_network_caption(shown)),
        tree=tree_picture(shown.fabric, _cells(shown.after), shown.tier, shown.colour),
        front_caption=escape(_front_caption(shown)),
        front=_front(shown),
        spreads=_spread_table(shown),
        # Names must not end the script.
        groups=json.dumps(_groups(shown)).replace("</", "<\\/"),
    )


def _shown(plan: Plan, cluster: Cluster) -> _Shown:
    if plan.planner != "placement" or "job" not in plan.details:
        raise BadInput(
            f"the plan is one of the planner {plan.planner!r}",
            fix="give a plan of trimtab plan placement",
        )
    job = validate(TrainingJob, plan.details["job"], where="details.job")
    fabric = Fabric.of(cluster)
    order = [slot.node for slot in plan.ranks[:: job.ranks_per_node]]
    paths = {place.name: place.path for place in fabric.places}
    lost = next((node for node in order if node not in paths), None)
    if lost is not None:
        raise BadInput(
            f"the plan's node {lost!r} is none of {cluster.name}",
            fix="give the cluster that the plan was made for",
        )
    tier_name = plan.details.get("tier")
    tier = fabric.tier(str(tier_name)) if tier_name in fabric.tiers else 0
    domain_of = {
        name: path[tier] if tier < len(path) else "network" for name, path in paths.items()
    }
    used = list(dict.fromkeys(domain_of[p.name] for p in fabric.places if p.name in set(order)))
    volumes = job.step_volumes()
    moved = None
    if volumes is not None:
        before, after = (traffic(fabric, job, o, tier, volumes) for o in (sorted(order), order))
        moved = before, after
    return _Shown(
        plan,
        job,
        fabric,
        tier,
        _grid(job, order),
        _grid(job, sorted(order)),
        domain_of,
        colours(used),
        volumes,
        moved,
    )


def _grid(job: TrainingJob, order: Sequence[str]) -> HostGrid:
    """The nodes of the grid where node ranks go in an order."""
    grid = job.grid
    hosts = np.empty((grid.rows, grid.columns), dtype=object)
    for row, column in np.ndindex(grid.rows, grid.columns):
        hosts[row, column] = order[grid.node_rank(row, column)]
    return hosts


def _cells(hosts: HostGrid) -> dict[str, Cell]:
    return {str(hosts[at]): (at[0], at[1]) for at in np.ndindex(hosts.shape)}


def _plural(word: str) -> str:
    return {"leaf": "leaves", "network": "networks"}.get(word, f"{word}s")


def _subtitle(shown: _Shown) -> str:
    job = shown.job
    degrees = {
        "tensor": job.tensor_parallel,
        "context": job.context_parallel,
        "data": job.data_parallel or 1,
        "pipeline": job.pipeline_parallel,
        "expert": job.expert_parallel,
    }
    parts = ", ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)
    return (
        f"{len(shown.plan.ranks):,} ranks on {shown.after.size:,} of "
        f"{len(shown.fabric.places):,} nodes ({parts or 'no parallelism'}); made "
        f"{shown.plan.created:%Y-%m-%d %H:%M} UTC."
    )


def _widest(shown: _Shown, hosts: HostGrid) -> tuple[int, int]:
    """The pipeline and the data spread of a grid of nodes."""
    domain = np.vectorize(shown.domain_of.__getitem__, otypes=[object])(hosts)
    return max(len(set(row)) for row in domain), max(len(set(column)) for column in domain.T)


def _facts(shown: _Shown) -> str:
    objective = shown.plan.objective
    pipeline, data = _widest(shown, shown.after)
    old_pipeline, old_data = _widest(shown, shown.before)
    bound = "no bound known" if objective.bound is None else f"no plan is below {objective.bound:g}"
    tiers = _plural(shown.tier_name)
    proof = "proven best" if objective.status == "optimal" else bound
    facts = [
        (f"{objective.value:g}", f"weighted spread, {proof}"),
        (f"{old_pipeline} → {pipeline}", f"{tiers} of the widest pipeline group"),
        (f"{old_data} → {data}", f"{tiers} of the widest data parallel group"),
        (
            f"{round(float(cast(Any, shown.plan.details.get('alpha', 0.5))), 3):g}",
            "weight of data spread",
        ),
    ]
    return fact_boxes(facts)


def _warnings(plan: Plan) -> str:
    if not plan.warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in plan.warnings)
    return f'<section class="warn"><h2>Warnings</h2><ul>{items}</ul></section>'


def _matrices(shown: _Shown) -> str:
    pictures = []
    for name, hosts in (("By hostname", shown.before), ("By the plan", shown.after)):
        pipeline, data = _widest(shown, hosts)
        caption = f"<b>{name}</b>: widest row {pipeline}, widest column {data}"
        picture = matrix(hosts, shown.domain_of, shown.colour)
        pictures.append(f"<figure><figcaption>{caption}</figcaption>{picture}</figure>")
    return "".join(pictures)


def _traffic_caption(shown: _Shown) -> str:
    if shown.moved is None:
        return (
            "How much groups send is not known: give the job's model, shape or volumes to see it."
        )
    facts = cast(Mapping[str, Any], shown.plan.details.get("communication", {}))
    source = facts.get("alpha_from")
    weight = f" The weight of data spread comes from: {source}." if source else ""
    return (
        f"What all ranks send in a step, from each of the {_plural(shown.tier_name)} (rows) to each"
        f" other (columns); darker is more, and both pictures have one scale. Rings go round groups"
        f" in the order of ranks.{weight}"
    )


def _between(shown: _Shown) -> str:
    if shown.moved is None or len(shown.moved[0].domains) == 1:
        return ""
    outside = [one.between * ~np.eye(len(one.domains), dtype=bool) for one in shown.moved]
    most = max(float(sent.max()) for sent in outside)
    figures = []
    for name, one, sent in zip(("By hostname", "By the plan"), shown.moved, outside, strict=True):
        caption = f"{name}: {shown_bytes(sum(one.crossing.values()))} a step"
        picture = between_picture(sent, one.domains, most, shown_bytes)
        figures.append(f"<figure><figcaption>{escape(caption)}</figcaption>{picture}</figure>")
    return "".join(figures)


def _volume_table(shown: _Shown) -> str:
    if shown.volumes is None or shown.moved is None:
        return ""
    before, after = shown.moved
    rows = []
    for kind, sent_bytes in shown.volumes.model_dump().items():
        if not sent_bytes:
            continue
        was, now = (one.crossing.get(kind, 0.0) for one in (before, after))
        mark = ' class="better"' if now < was * (1 - 1e-9) else ""
        rows.append(
            f"<tr><td>{escape(kind.replace('_', ' '))}</td><td>{shown_bytes(sent_bytes)}</td>"
            f"<td>{shown_bytes(was)}</td><td{mark}>{shown_bytes(now)}</td></tr>"
        )
    head = (
        "<tr><th>groups</th><th>a rank sends in a step</th>"
        f"<th>leave a {escape(shown.tier_name)}, by hostname</th><th>by the plan</th></tr>"
    )
    return f"<table>{head}{''.join(rows)}</table>"


def _legend(shown: _Shown) -> str:
    return "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour in shown.colour.items()
    )


def _network_caption(shown: _Shown) -> str:
    idle = len(shown.fabric.places) - shown.after.size
    rest = f" {idle:,} nodes without a rank are grey." if idle else ""
    return (
        f"Each square is a node under its switches, coloured by {shown.tier_name}."
        f" Groups picked above are picked here too.{rest}"
    )


def _front_caption(shown: _Shown) -> str:
    return (
        "Each point is a placement that was built and counted; none is better in both. The filled"
        " one was chosen for its weighted spread. No placement lies in the shaded area."
    )


def _front(shown: _Shown) -> str:
    details = cast(Mapping[str, Any], shown.plan.details)
    points = [(int(p["pipeline"]), int(p["data"])) for p in details.get("front", [])]
    return front_picture(
        points or [_widest(shown, shown.after)],
        chosen=_widest(shown, shown.after),
        before=_widest(shown, shown.before),
        bound=details.get("bound", []),
        domains=_plural(shown.tier_name),
    )


def _spread_table(shown: _Shown) -> str:
    after = cast(Mapping[str, Any], shown.plan.details.get("tiers", {}))
    if not after:
        return "<p>All nodes hang on one switch, so every group touches one domain.</p>"
    before: Mapping[str, Any] = {}
    if len(shown.plan.ranks) <= _MOST_PAIRWISE_RANKS:
        before = group_spreads(shown.fabric, shown.job, _by_rank(shown))
    rows = []
    for tier, kinds in after.items():
        for kind, spread in kinds.items():
            old = before.get(tier, {}).get(kind)
            cells = [_pair(old, spread, "widest", ".0f"), _pair(old, spread, "mean", ".2f")]
            rows.append(
                f"<tr><td>{escape(_plural(tier))}</td><td>{escape(kind)}</td>{''.join(cells)}</tr>"
            )
    head = "<tr><th>domains</th><th>groups</th>" + "".join(
        f"<th>{key}, by hostname</th><th>by the plan</th>" for key in ("widest", "mean")
    )
    return f"<table>{head}</tr>{''.join(rows)}</table>"


def _pair(old: Mapping[str, float] | None, new: Mapping[str, float], key: str, form: str) -> str:
    better = old is not None and new[key] < old[key] - 1e-9
    was = "–" if old is None else format(old[key], form)
    mark = ' class="better"' if better else ""
    return f"<td>{was}</td><td{mark}>{format(new[key], form)}</td>"


def _by_rank(shown: _Shown) -> list[str]:
    """The nodes by node rank where they are numbered by hostname."""
    return sorted(str(node) for node in shown.after.ravel())


def _groups(shown: _Shown) -> dict[str, dict[str, list[list[str]]]]:
    """The domains of each row (``r``) and column (``c``), by hostname and by the plan."""

    def domains(nodes: Sequence[object]) -> list[str]:
        return list(dict.fromkeys(shown.domain_of[str(node)] for node in nodes))

    rows, columns = shown.after.shape
    return {
        "r": {
            str(r): [domains(list(shown.before[r])), domains(list(shown.after[r]))]
            for r in range(rows)
        },
        "c": {
            str(c): [domains(list(shown.before[:, c])), domains(list(shown.after[:, c]))]
            for c in range(columns)
        },
    }
