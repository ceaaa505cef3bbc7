"""torchrun: the order of its nodes.

Each node runs its own torchrun. The static rendezvous numbers them as they are told; the dynamic
one (c10d) sorts them by name, so that ours (`trimtab.hosts.torch.rendezvous`) takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping

from trimtab.core.cache import keep
from trimtab.core.errors import BadInput, Unsupported
from trimtab.hosts.host_order import lookup, own_host
from trimtab.hosts.job_variables import HOST_VARIABLE
from trimtab.hosts.launcher_command import LauncherCommand

BACKEND = "trimtab"
"""Our rendezvous, by the name under which torchrun finds it."""

PLAN_SETTING = "plan"
"""The key in ``--rdzv-conf`` of the plan or hostfile that our rendezvous orders the nodes by."""

_REPLACEABLE = ("c10d", BACKEND)


def with_hosts(
    command: LauncherCommand, ranks: Mapping[str, int], environment: Mapping[str, str]
) -> LauncherCommand:
    """The command of this node, which then gets its place in the order.

    Args:
        command: torchrun's command on this node.
        ranks: how many ranks each host gets, in rank order.
        environment: the environment it will run in.

    Raises:
        BadInput: this node is not in the order, or the command contradicts it.
        Unsupported: torchrun cannot number ranks in this way.
    """
    if len(set(ranks.values())) > 1:
        raise Unsupported(
            f"the hosts get {sorted(set(ranks.values()))} ranks each",
            fix="torchrun needs as many on every host; launch with deepspeed",
        )
    processes = str(next(iter(ranks.values())))
    _check_number("nproc-per-node", processes, command, environment)
    command = _with(command, "--nproc-per-node", processes)
    if _is_standalone(command, environment):
        return _alone(command, ranks)
    rendezvous = _value(command, environment, "rdzv-backend") or "static"
    if rendezvous == "static":
        return _numbered(command, ranks, environment)
    if rendezvous in _REPLACEABLE:
        return _sorted(command, ranks, environment)
    raise Unsupported(
        f"--rdzv-backend {rendezvous} numbers the nodes by itself",
        fix="give --rdzv-backend c10d, or leave it out, so that the nodes get the plan's order",
    )


def _alone(command: LauncherCommand, ranks: Mapping[str, int]) -> LauncherCommand:
    if len(ranks) > 1:
        raise BadInput(
            f"--standalone is for one host, and the plan has {len(ranks)}",
            fix="leave it out, so that the nodes get the order of the plan",
        )
    return command


def _numbered(
    command: LauncherCommand, ranks: Mapping[str, int], environment: Mapping[str, str]
) -> LauncherCommand:
    """The command for the static rendezvous, with the first host as the master."""
    hosts = list(ranks)
    _check_number("nnodes", str(len(hosts)), command, environment)
    own = own_host(environment)
    place = lookup(hosts)(own)
    if place is None:
        raise BadInput(
            f"this machine, {own!r}, is not one host of the plan",
            fix=f"set {HOST_VARIABLE} to one of {', '.join(hosts[:20])}",
        )
    command = _with(command, "--master-addr", hosts[0])
    command = _with(command, "--node-rank", str(place))
    return _with(command, "--nnodes", str(len(hosts)))


def _sorted(
    command: LauncherCommand, ranks: Mapping[str, int], environment: Mapping[str, str]
) -> LauncherCommand:
    """The command for the dynamic rendezvous, which then sorts the nodes by the order."""
    nodes = _value(command, environment, "nnodes")
    least, colon, most = (nodes or str(len(ranks))).partition(":")
    if not _within(len(ranks), least, most if colon else least):
        raise BadInput(
            f"--nnodes is {nodes}, where the plan has {len(ranks)}",
            fix=f"give {len(ranks)}, or leave it out",
        )
    if nodes is None:
        command = _with(command, "--nnodes", str(len(ranks)))
    order = keep("".join(f"{host} slots={slots}\n" for host, slots in ranks.items()), "hostfile")
    settings = _value(command, environment, "rdzv-conf")
    ours = f"{PLAN_SETTING}={order.absolute()}"
    command = _with(command, "--rdzv-conf", f"{settings},{ours}" if settings else ours)
    return _with(command, "--rdzv-backend", BACKEND)


def _within(planned: int, least: str, most: str) -> bool:
    """Whether a range has room for the planned number; one that is none is torchrun's to judge."""
    numbers = least.isdecimal() and most.isdecimal()
    return not numbers or int(least) <= planned <= int(most)


def _is_standalone(command: LauncherCommand, environment: Mapping[str, str]) -> bool:
    told = environment.get("PET_STANDALONE", "0") not in ("", "0")
    return told or command.option("--standalone") is not None


def _check_number(
    name: str, planned: str, command: LauncherCommand, environment: Mapping[str, str]
) -> None:
    """Whether the command leaves a number open or gives the planned one."""
    given = _value(command, environment, name)
    if given not in (None, planned):
        raise BadInput(
            f"--{name} is {given}, where the plan has {planned}",
            fix=f"give {planned}, or leave it out",
        )


def _value(command: LauncherCommand, environment: Mapping[str, str], name: str) -> str | None:
    """An option's value; torchrun takes it from a variable where the command has none."""
    variable = f"PET_{name.upper().replace('-', '_')}"
    return command.option(f"--{name}") or environment.get(variable) or None


def _with(command: LauncherCommand, option: str, value: str) -> LauncherCommand:
    return command.with_option((option,), value, as_=option)
