"""A training launch with the plan's order of hosts and the plugins' changes applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trimtab.core.launch import LaunchChange, Launcher, LaunchRequest
from trimtab.hosts import host_order, launcher_command, slurm, versions
from trimtab.hosts.deepspeed import launching as deepspeed
from trimtab.hosts.deepspeed.config import find, read_block, training_plugins
from trimtab.hosts.job_variables import PLAN_VARIABLE
from trimtab.hosts.launcher_command import LauncherCommand
from trimtab.hosts.torch import launching as torch

FRAMEWORKS: Mapping[Launcher, str] = {"deepspeed": "deepspeed", "torchrun": "torch"}
"""The framework whose version decides how a launcher behaves."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A command as it is to be run, and its environment.

    Attributes:
        command: the launcher and its arguments.
        environment: all of it.
        idle: hosts of the hostfile or the allocation that get no rank.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    idle: tuple[str, ...] = ()


def prepare(
    command: Sequence[str],
    environment: Mapping[str, str],
    plan: Path | None = None,
    config: Path | None = None,
) -> Launch:
    """What is to be run in place of a launcher's command.

    Without a plugin in the job's DeepSpeed configuration and without a plan, it is the command
    itself.

    Args:
        command: the launcher and its arguments.
        environment: the environment of the launch.
        plan: a plan, or a hostfile, in whose order the hosts get their ranks.
        config: the configuration whose block counts, instead of the one that the job names.

    Raises:
        BadInput: the launcher is unknown, the plan is none for this job, or a plugin or the order
            cannot be applied to the launcher.
    """
    parsed = launcher_command.parse(command)
    block = find(parsed.job) if config is None else read_block(config)
    plugins = training_plugins(block) if block is not None else []
    if not plugins and plan is None:
        return Launch(tuple(command), environment)
    if parsed.launcher in FRAMEWORKS:
        versions.require(FRAMEWORKS[parsed.launcher])
    given = deepspeed.hosts(parsed) if parsed.launcher == "deepspeed" else {}
    request = LaunchRequest(parsed.launcher, parsed.words, environment, given)
    if plan is not None:
        request = changed(request, _planned(plan))
    is_ordered = plan is not None
    for plugin, options in plugins:
        change = plugin.launch(options, request)
        if change is not None:
            request = changed(request, change)
            is_ordered = is_ordered or bool(change.hosts)
    if not is_ordered:
        return _applied(request, None, environment)
    listed = deepspeed.listed(parsed) if parsed.launcher == "deepspeed" else {}
    return replace(_applied(request, given, environment), idle=_idle(request, listed))


def changed(request: LaunchRequest, change: LaunchChange) -> LaunchRequest:
    """The request as the next plugin sees it."""
    parsed = launcher_command.parse(request.command)
    return replace(
        request,
        command=parsed.with_arguments(change.launcher_arguments).words,
        environment={**request.environment, **change.environment},
        hosts=change.hosts or request.hosts,
    )


def _planned(plan: Path) -> LaunchChange:
    """What a plan changes: the order of the hosts, and a variable by which the job can check it."""
    return LaunchChange(
        environment={PLAN_VARIABLE: str(plan.absolute())},
        hosts=host_order.read_order(plan),
    )


def _applied(
    request: LaunchRequest, given: Mapping[str, int] | None, environment: Mapping[str, str]
) -> Launch:
    """The launch with the order of hosts and the new variables told to the launcher.

    Args:
        request: the launch after all plugins.
        given: the ranks of each host that the launcher would start by itself; None where neither
            a plan nor a plugin orders the hosts.
        environment: what the environment was before the plugins.
    """
    parsed = launcher_command.parse(request.command)
    final = dict(request.environment)
    if parsed.launcher == "srun" and request.hosts:
        final |= slurm.variables(request.hosts)
    added = {name: value for name, value in final.items() if environment.get(name) != value}
    if given is not None:
        parsed = _with_hosts(parsed, request, given)
    remote = request.hosts and not deepspeed.starts_here(parsed, request.hosts)
    if parsed.launcher == "deepspeed" and added and remote:
        final = deepspeed.exporting(final, added)
    return Launch(parsed.words, final)


def _idle(request: LaunchRequest, listed: Mapping[str, int]) -> tuple[str, ...]:
    """The hosts of the launcher's hostfile, else of the allocation, that the order leaves out."""
    if not request.hosts:
        return ()
    place_of = host_order.lookup(list(request.hosts))
    at_hand = listed or slurm.allocated(request.environment)
    return tuple(host for host in at_hand if place_of(host) is None)


def _with_hosts(
    parsed: LauncherCommand, request: LaunchRequest, given: Mapping[str, int]
) -> LauncherCommand:
    """The command with the order of hosts, where that is one for these hosts."""
    hosts, environment = request.hosts, request.environment
    slurm.check_allocation(hosts, environment)
    if parsed.launcher == "deepspeed":
        is_here = deepspeed.starts_here(parsed, hosts)
        place = host_order.own_place(list(hosts), environment) if is_here else None
        return deepspeed.with_hosts(parsed, hosts, given, place)
    if parsed.launcher == "torchrun":
        return torch.with_hosts(parsed, hosts, environment)
    return slurm.with_hosts(parsed, hosts)
