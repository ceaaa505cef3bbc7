"""srun: the order of its tasks.

Inside an allocation, ``--distribution=arbitrary`` puts each task on the host that its line of the
file in ``SLURM_HOSTFILE`` names; ``--nodelist`` would be sorted.
"""

from __future__ import annotations

from collections.abc import Mapping

from trimtab.core.cache import keep
from trimtab.core.errors import BadInput
from trimtab.hosts.launcher_command import LAUNCHERS, LauncherCommand

_DISTRIBUTION = ("-m", "--distribution")
_TASKS = ("-n", "--ntasks")
_NODES = ("-N", "--nodes")
_LISTS = ("-w", "--nodelist", "-F", "--nodefile", "-x", "--exclude")


def variables(ranks: Mapping[str, int]) -> dict[str, str]:
    """What srun reads the order from: a file with the host of each task on a line."""
    text = "".join(f"{host}\n" * count for host, count in ranks.items())
    return {"SLURM_HOSTFILE": str(keep(text, "slurm-hostfile").absolute())}


def with_hosts(command: LauncherCommand, ranks: Mapping[str, int]) -> LauncherCommand:
    """The command with one task for each rank, on the hosts of ``SLURM_HOSTFILE``.

    Args:
        command: srun's command, inside an allocation.
        ranks: how many ranks each host gets, in rank order.

    Raises:
        BadInput: the command contradicts the order, or starts another launcher on each host.
    """
    _check_job(command)
    distribution = command.option(*_DISTRIBUTION)
    if distribution not in (None, "arbitrary"):
        raise BadInput(
            f"--distribution is {distribution}, which numbers the tasks by itself",
            fix="leave it out, so that the tasks get the order of the plan",
        )
    for name in _LISTS:
        if command.option(name) is not None:
            raise BadInput(f"{name} contradicts the plan's list of hosts", fix="leave it out")
    for names, planned in ((_NODES, len(ranks)), (_TASKS, sum(ranks.values()))):
        given = command.option(*names)
        if given not in (None, str(planned), f"{planned}-{planned}"):
            raise BadInput(
                f"{names[1]} is {given}, where the plan has {planned}",
                fix=f"give {planned}, or leave it out",
            )
        command = command.with_option(names, str(planned), as_=names[1])
    return command.with_option(_DISTRIBUTION, "arbitrary", as_=_DISTRIBUTION[1])


def _check_job(command: LauncherCommand) -> None:
    """Whether each task is a rank: a launcher in a task numbers the ranks by itself."""
    if command.job and LAUNCHERS.get(command.job[0]) in ("deepspeed", "torchrun"):
        raise BadInput(
            f"srun would start {command.job[0]} once for each rank",
            fix=f"write srun … trimtab launch --plan PLAN -- {command.job[0]} …",
        )
