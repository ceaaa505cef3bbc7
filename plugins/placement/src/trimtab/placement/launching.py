"""A training launch in a plan's order: of one that was made, or of one made for these hosts."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from trimtab.core.cache import keep
from trimtab.core.errors import BadInput
from trimtab.core.launch import LaunchChange, LaunchRequest
from trimtab.core.plan import Plan
from trimtab.core.topology import read_topology
from trimtab.hosts.host_order import hosts_of, read_order
from trimtab.hosts.job_variables import CHECK_VARIABLE, PLAN_VARIABLE, STRICT_VARIABLE
from trimtab.hosts.slurm import allocated
from trimtab.placement.config import PlacementConfig
from trimtab.placement.job import TrainingJob
from trimtab.placement.planner import plan_placement


def launch_change(config: PlacementConfig, request: LaunchRequest) -> LaunchChange | None:
    """The order of hosts that a launch gets, and the variables by which the job can check it.

    A plan on the command line goes before the options.

    Raises:
        BadInput: the plan is none for this job, or the hosts to order are not known.
        Infeasible: the hosts do not hold the job.
    """
    told = {STRICT_VARIABLE: "1"} if config.strict else {}
    if not config.check:
        told[CHECK_VARIABLE] = "0"
    if _has_plan(request):
        return LaunchChange(environment=told)
    if config.plan is not None:
        path = Path(config.plan)
        hosts = _hosts_of(_checked(path, config.cluster), config.plan)
    elif config.cluster is not None:
        path, hosts = _planned_here(config, config.cluster, request)
    else:
        raise BadInput(
            "the options name neither a plan nor a cluster",
            where="trimtab.placement",
            fix="give plan, or cluster and job",
        )
    return LaunchChange(environment={PLAN_VARIABLE: str(path.absolute()), **told}, hosts=hosts)


def _has_plan(request: LaunchRequest) -> bool:
    """Whether the order is already that of a plan, and not of one that an outer job left behind."""
    path = request.environment.get(PLAN_VARIABLE)
    if path is None or not Path(path).is_file():
        return False
    return list(read_order(path).items()) == list(request.hosts.items())


def _checked(path: Path, cluster: str | None) -> Plan:
    """The plan of a file, which must be about placement and, if one is given, this cluster."""
    plan = Plan.read(path)
    if plan.planner != "placement":
        raise BadInput(
            f"this is a {plan.planner} plan",
            where=str(path),
            fix="give one that trimtab plan placement made",
        )
    if cluster is not None and plan.stale_inputs({"cluster": read_topology(cluster)}):
        raise BadInput(
            f"the plan was made for another cluster than {cluster} describes now",
            where=str(path),
            fix="plan again",
        )
    return plan


def _hosts_of(plan: Plan, where: str) -> dict[str, int]:
    try:
        return hosts_of(plan)
    except BadInput as error:
        raise type(error)(error.what, where=error.where or where, fix=error.fix) from None


def _planned_here(
    config: PlacementConfig, cluster: str, request: LaunchRequest
) -> tuple[Path, dict[str, int]]:
    """A plan for the hosts of a fixed allocation, and its order."""
    if config.job is None:
        raise BadInput(
            "the options name a cluster and no job",
            where="trimtab.placement",
            fix="give the job file as job",
        )
    plan = plan_placement(
        read_topology(cluster),
        TrainingJob.read(config.job),
        mode="reorder",
        hosts=_allocation(config, request),
        effort=config.effort,
    )
    # Nothing of the moment, so that each launch and each node keeps the same file.
    made = datetime.fromtimestamp(int(Path(cluster).stat().st_mtime), UTC)
    objective = plan.objective.model_copy(update={"wall_s": 0.0})
    lasting = plan.model_copy(update={"created": made, "objective": objective})
    return keep(lasting.model_dump_json(indent=2) + "\n", "plan"), hosts_of(plan)


def _allocation(config: PlacementConfig, request: LaunchRequest) -> list[str]:
    """The hosts that the job was given: by the options, the launcher's hostfile, or Slurm."""
    named = list(read_order(config.hosts)) if config.hosts is not None else list(request.hosts)
    found = named or allocated(request.environment)
    if not found:
        raise BadInput(
            "no hosts are known that could be ordered",
            where="trimtab.placement",
            fix="give a hostfile as hosts, or launch inside a Slurm allocation",
        )
    return found
