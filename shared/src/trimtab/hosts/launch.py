"""A training launch with the plan's order of hosts and the plugins' changes applied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trimtab.core.errors import BadInput, Unsupported
from trimtab.core.launch import LaunchChange, Launcher, LaunchRequest
from trimtab.hosts import launcher_command, versions
from trimtab.hosts.deepspeed import launching as deepspeed
from trimtab.hosts.deepspeed.config import find, training_plugins
from trimtab.hosts.launcher_command import LauncherCommand
from trimtab.hosts.torch import launching as torch

if TYPE_CHECKING:
    from trimtab.core.plan import Plan

FRAMEWORKS: Mapping[Launcher, str] = {"deepspeed": "deepspeed", "torchrun": "torch"}
"""The framework whose version decides how a launcher behaves."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A command as it is to be run, and its environment."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


def hosts_of(plan: Plan) -> dict[str, int]:
    """How many ranks a training plan gives each machine, in rank order.

    Raises:
        BadInput: the plan is not about training.
        Unsupported: it numbers ranks in a way that needs more than an order of machines.
    """
    if not plan.ranks:
        raise BadInput(
            f"a {plan.planner} plan has no ranks to launch",
            fix="give a plan of a training job, as trimtab plan placement makes it",
        )
    hosts = Counter(slot.node for slot in plan.ranks)
    in_order = [(host, device) for host, count in hosts.items() for device in range(count)]
    if in_order != [(slot.node, slot.device) for slot in plan.ranks]:
        raise Unsupported(
            "the plan numbers ranks across machines in turn, or leaves devices of one out",
            fix="write it for Slurm with trimtab emit --to slurm",
        )
    return dict(hosts)


def prepare(
    command: Sequence[str],
    environment: Mapping[str, str],
    hosts: Mapping[str, int] | None = None,
) -> Launch:
    """What is to be run in place of a launcher's command.

    Without a plugin in the job's DeepSpeed configuration and without an order of hosts, it is the
    command itself.

    Args:
        command: the launcher and its arguments.
        environment: the environment of the launch.
        hosts: how many ranks a plan gives each machine, in rank order.

    Raises:
        BadInput: the launcher is unknown, or a plugin or the order cannot be applied to it.
    """
    parsed = launcher_command.parse(command)
    block = find(parsed.job)
    plugins = training_plugins(block) if block is not None else []
    if not plugins and not hosts:
        return Launch(tuple(command), environment)
    if parsed.launcher in FRAMEWORKS:
        versions.require(FRAMEWORKS[parsed.launcher])
    given = deepspeed.hosts(parsed) if parsed.launcher == "deepspeed" else {}
    request = LaunchRequest(parsed.launcher, parsed.words, environment, hosts or given)
    for plugin, options in plugins:
        change = plugin.launch(options, request)
        if change is not None:
            request = changed(request, change)
    return _applied(request, given, environment)


def changed(request: LaunchRequest, change: LaunchChange) -> LaunchRequest:
    """The request as the next plugin sees it."""
    parsed = launcher_command.parse(request.command)
    return replace(
        request,
        command=parsed.with_arguments(change.launcher_arguments).words,
        environment={**request.environment, **change.environment},
        hosts=change.hosts or request.hosts,
    )


def _applied(
    request: LaunchRequest, given: Mapping[str, int], environment: Mapping[str, str]
) -> Launch:
    """The launch with the order of hosts and the new variables told to the launcher.

    Args:
        request: the launch after all plugins.
        given: the slots of the launcher's own hostfile.
        environment: what the environment was before the plugins.
    """
    parsed = launcher_command.parse(request.command)
    final = dict(request.environment)
    added = {name: value for name, value in final.items() if environment.get(name) != value}
    if list(request.hosts.items()) != list(given.items()):
        parsed = _with_hosts(parsed, request)
    if parsed.launcher == "deepspeed" and added and len(request.hosts) > 1:
        final = deepspeed.exporting(final, added)
    return Launch(parsed.words, final)


def _with_hosts(parsed: LauncherCommand, request: LaunchRequest) -> LauncherCommand:
    if parsed.launcher == "deepspeed":
        return deepspeed.with_hosts(parsed, request.hosts)
    if parsed.launcher == "torchrun":
        return torch.with_hosts(parsed, request.hosts, request.environment)
    raise Unsupported(
        "srun takes no order of hosts from trimtab launch",
        fix="write it for Slurm with trimtab emit --to slurm",
    )
