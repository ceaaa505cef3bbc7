"""Whether a running job lies where its plan says: asked from inside, after its initialisation."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from trimtab.core.documents import parse_json, validate
from trimtab.core.errors import BadInput, TrimtabError
from trimtab.core.plan import Plan
from trimtab.hosts.deepspeed.groups import live_topology, topology_groups, topology_of
from trimtab.hosts.host_order import lookup
from trimtab.hosts.job_variables import PLAN_VARIABLE, STRICT_VARIABLE
from trimtab.hosts.torch.job_check import LiveRank, is_first_rank, judged, mesh_groups
from trimtab.placement.job import GroupKind, TrainingJob

log = logging.getLogger("trimtab")

Groups = Mapping[str, Sequence[Sequence[int]]]
"""Groups of global ranks by the name of what they do, e.g. ``{"data": [[0, 2], [1, 3]]}``."""

KINDS: Mapping[GroupKind, frozenset[str]] = {
    "tensor": frozenset({"tensor", "tp", "model", "mp", "tensor_parallel"}),
    "context": frozenset({"context", "cp", "context_parallel"}),
    "expert": frozenset({"expert", "ep", "expert_parallel"}),
    "data": frozenset({"data", "dp", "ddp", "fsdp", "data_parallel"}),
    "pipeline": frozenset({"pipeline", "pipe", "pp", "pipeline_parallel"}),
}
"""What frameworks and their users call the groups of each kind."""

PARTS: Mapping[str, GroupKind] = {
    "dp_replicate": "data",
    "dp_shard": "data",
    "replicate": "data",
    "shard": "data",
}
"""Dimensions whose groups are parts of the groups of a kind, as in hybrid sharding."""


@dataclass(frozen=True, slots=True)
class JobCheck:
    """What differs between a live job and its plan.

    Attributes:
        misplaced: a sentence on the ranks that run elsewhere than planned, if any do.
        regrouped: a sentence for each kind of group that the framework makes otherwise.
        spreads: domains that the widest live group of each kind touches, by tier and kind.
        planned_spreads: the same of the plan.
    """

    misplaced: tuple[str, ...] = ()
    regrouped: tuple[str, ...] = ()
    spreads: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    planned_spreads: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def widened(self) -> tuple[str, ...]:
        """A sentence for each kind of group that touches more domains than planned."""
        return tuple(
            f"the widest {kind} group touches {live} of the tier {tier}, where the plan has"
            f" {planned}"
            for tier, kinds in self.planned_spreads.items()
            for kind, planned in kinds.items()
            if (live := self.spreads.get(tier, {}).get(kind, 0)) > planned
        )

    @property
    def differences(self) -> tuple[str, ...]:
        """All sentences; empty where the job lies as planned."""
        return self.misplaced + self.regrouped + self.widened


def check_job(
    *layouts: Any, plan: str | Path | None = None, strict: bool | None = None
) -> JobCheck:
    """Compares a running job with its plan; every rank must call it, after initialisation.

    Args:
        layouts: what the framework made its groups from: a ``DeviceMesh``, a DeepSpeed
            ``ProcessTopology``, ``PipelineParallelGrid`` or pipeline engine, or a mapping from the
            name of a kind to groups of global ranks; by default the job's meshes whose dimensions
            have names, and the topology of its DeepSpeed engine.
        plan: the plan file, which the first rank reads; by default the launch's own.
        strict: whether a difference is an error; by default what the launch was told.

    Returns:
        What differs; the first rank also logs it as a warning.

    Raises:
        BadInput: there is no plan; a layout's groups are not in ascending order, which loses
            checkpoints and mixes up tensors; or the job differs and ``strict`` is set.
        TrimtabError: a rank did not come.
    """
    given = [groups_of(layout) for layout in layouts]
    for groups in given:
        require_ascending(groups)
    where = str(plan or os.environ.get(PLAN_VARIABLE, ""))
    told = parse_json(judged(lambda live: _verdict(where, live, given)), where=where)
    if "error" in told:
        raise BadInput(told["error"])
    found = JobCheck(
        tuple(told["misplaced"]), tuple(told["regrouped"]), told["spreads"], told["planned_spreads"]
    )
    if found.differences:
        sentence = "; ".join(found.differences)
        if _is_strict(strict):
            raise BadInput(
                sentence, where=where, fix="launch with trimtab launch --plan, or plan again"
            )
        if is_first_rank():
            log.warning("trimtab: %s: %s.", where, sentence)
    return found


def check_first_step() -> None:
    """What a job with a plan does by itself before its first optimizer step.

    Raises:
        BadInput: the launch was told to be strict, and the job differs from its plan or cannot be
            compared with it.
    """
    try:
        check_job()
    except TrimtabError as error:
        if _is_strict(None):
            raise
        if is_first_rank():
            log.warning("trimtab: the job was not compared with its plan: %s", error)


def groups_of(layout: Any) -> Groups:
    """The groups of global ranks that a layout makes.

    Raises:
        BadInput: it is no layout that is known.
    """
    if isinstance(layout, Mapping):
        return layout
    if hasattr(layout, "mesh_dim_names"):
        return mesh_groups(layout)
    topology = topology_of(layout)
    if topology is not None:
        return topology_groups(topology)
    raise BadInput(
        f"a {type(layout).__name__} is no layout of groups",
        fix="give a DeviceMesh, a DeepSpeed topology, grid or engine, or a mapping of groups",
    )


def require_ascending(groups: Groups) -> None:
    """Goes on only if the ranks of each group ascend.

    torch sorts the ranks of a group, whatever order it is given: a rank's place in its group and
    its coordinate in the layout then differ, so that DTensors are put together in the wrong order
    and DeepSpeed leaves out files of a checkpoint.

    Raises:
        BadInput: a group does not.
    """
    for name, members in groups.items():
        for ranks in members:
            if any(a >= b for a, b in pairwise(ranks)):
                raise BadInput(
                    f"the {name} group {_some(ranks)} is not in ascending order, which would mix up"
                    " tensors and checkpoints",
                    fix="number the hosts at launch, with trimtab launch --plan, and let the ranks"
                    " in the job be",
                )


def compare(plan: Plan, live: Sequence[LiveRank], layouts: Iterable[Groups] = ()) -> JobCheck:
    """What differs between a plan and the ranks and groups of a live job.

    Raises:
        BadInput: the plan is about no training job.
    """
    job = _job_of(plan)
    if len(live) != len(plan.ranks):
        return JobCheck(
            misplaced=(f"the job has {len(live)} ranks, where the plan has {len(plan.ranks)}",)
        )
    hosts = _planned_names(plan, live)
    return JobCheck(
        misplaced=_misplaced(plan, live),
        regrouped=tuple(_regrouped(job, layouts)),
        spreads=_spreads(plan, job, hosts),
        planned_spreads=_spreads(plan, job, [slot.node for slot in plan.ranks]),
    )


def _verdict(where: str, live: Sequence[LiveRank], given: Sequence[Groups]) -> str:
    """What the first rank has to say to all: a `JobCheck`, or why there is none, as JSON."""
    try:
        found = compare(_plan_of(where), live, given or _made_groups(live))
    except BadInput as error:
        return json.dumps({"error": str(error).removesuffix(".")})
    return json.dumps(asdict(found))


def _plan_of(where: str) -> Plan:
    if not where:
        raise BadInput(
            "no plan is named", fix=f"launch with trimtab launch --plan, or set {PLAN_VARIABLE}"
        )
    return Plan.read(where)


def _made_groups(live: Sequence[LiveRank]) -> list[Groups]:
    """The groups that the job has made by now, as far as their kind is known."""
    meshes: dict[str, list[list[int]]] = {}
    for rank in live:
        for name, ranks in rank.groups.items():
            if list(ranks) not in (known := meshes.setdefault(name, [])):
                known.append(list(ranks))
    topology = live_topology()
    return [meshes] if topology is None else [meshes, topology_groups(topology)]


def _is_strict(strict: bool | None) -> bool:
    if strict is None:
        return os.environ.get(STRICT_VARIABLE, "0") not in ("", "0")
    return strict


def _job_of(plan: Plan) -> TrainingJob:
    if plan.planner != "placement" or "job" not in plan.details:
        raise BadInput(
            f"this is a {plan.planner} plan", fix="give one that trimtab plan placement made"
        )
    return validate(TrainingJob, plan.details["job"], where="details.job")


def _misplaced(plan: Plan, live: Sequence[LiveRank]) -> tuple[str, ...]:
    wrong = [
        rank
        for rank, (slot, found) in enumerate(zip(plan.ranks, live, strict=True))
        if slot.device != found.device or not found.runs_on(slot.node)
    ]
    if not wrong:
        return ()
    first, slot, found = wrong[0], plan.ranks[wrong[0]], live[wrong[0]]
    return (
        f"{len(wrong)} of {len(live)} ranks run elsewhere than planned, the first of them rank"
        f" {first} on {found.names[0]}/{found.device} instead of {slot.node}/{slot.device}",
    )


def _regrouped(job: TrainingJob, layouts: Iterable[Groups]) -> Iterable[str]:
    """A sentence for each kind of group that differs from the job's as it was planned."""
    for groups in layouts:
        for name, members in groups.items():
            kind = _kind(name)
            if kind is None:
                continue
            planned = [set(ranks) for ranks in job.groups(kind)]
            whole = name not in PARTS
            odd = next(
                (ranks for ranks in members if not _is_one(set(ranks), planned, whole)), None
            )
            if odd is not None:
                yield (
                    f"the framework's {name} group {_some(odd)} is no {kind} group of the plan,"
                    f" such as {_some(sorted(planned[0]))}"
                )


def _kind(name: str) -> GroupKind | None:
    if name in PARTS:
        return PARTS[name]
    return next((kind for kind, names in KINDS.items() if name.lower() in names), None)


def _is_one(ranks: set[int], planned: Sequence[set[int]], whole: bool) -> bool:
    return any(ranks == group if whole else ranks <= group for group in planned)


def _planned_names(plan: Plan, live: Sequence[LiveRank]) -> list[str]:
    """The host of each rank by the name that the plan has for it, else its own."""
    hosts = list(dict.fromkeys(slot.node for slot in plan.ranks))
    place_of = lookup(hosts)
    known: dict[tuple[str, ...], str] = {}
    for rank in live:
        if rank.names not in known:
            places = (place for name in rank.names if (place := place_of(name)) is not None)
            place = next(places, None)
            known[rank.names] = rank.names[0] if place is None else hosts[place]
    return [known[rank.names] for rank in live]


def _spreads(plan: Plan, job: TrainingJob, hosts: Sequence[str]) -> dict[str, dict[str, int]]:
    """The most domains that a group of each kind touches, by tier, with these hosts by rank.

    A host that the plan does not know is a domain of its own.
    """
    tiers = plan.details.get("tiers")
    paths = plan.details.get("paths")
    if not isinstance(tiers, Mapping) or not isinstance(paths, Mapping):
        return {}
    domains: Mapping[str, Any] = paths
    return {
        tier: {
            kind: max(
                len({domains[host][at] if host in domains else host for host in group})
                for group in ([hosts[rank] for rank in ranks] for ranks in job.groups(kind))
            )
            for kind in get_args(GroupKind)
        }
        for at, tier in enumerate(tiers)
    }


def _some(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:6]))
    return f"[{shown}{', …' if len(ranks) > 6 else ''}]"
