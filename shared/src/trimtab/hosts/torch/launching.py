"""torchrun: the order of its nodes.

Each node runs its own torchrun. The static rendezvous numbers them as they are told; the dynamic
one (c10d) sorts them by name, so that ours (`trimtab.hosts.torch.rendezvous`) takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trimtab.core.cache import keep
from trimtab.core.errors import BadInput, Unsupported
from trimtab.hosts.host_order import own_place
from trimtab.hosts.job_variables import STRICT_VARIABLE
from trimtab.hosts.launcher_command import LauncherCommand

BACKEND = "trimtab"
"""Our rendezvous, by the name under which torchrun finds it."""

PLAN_SETTING = "plan"
"""The key in ``--rdzv-conf`` of the plan or hostfile that our rendezvous orders the nodes by."""

STRICT_SETTING = "strict"
"""The key in ``--rdzv-conf`` of whether our rendezvous refuses nodes that differ from the plan."""

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
    is_standalone = _is_standalone(command, environment)
    if is_standalone and len(ranks) > 1:
        raise BadInput(
            f"--standalone is for one host, and the plan has {len(ranks)}",
            fix="leave it out, so that the nodes get the order of the plan",
        )
    if not is_standalone:
        _check_number("nnodes", str(len(ranks)), command, environment)
    place = own_place(list(ranks), environment)
    if is_standalone:
        return command
    rendezvous = _value(command, environment, "rdzv-backend") or "static"
    if rendezvous == "static":
        return _numbered(command, list(ranks), place)
    if rendezvous in _REPLACEABLE:
        return _sorted(command, ranks, environment)
    raise Unsupported(
        f"--rdzv-backend {rendezvous} numbers the nodes by itself",
        fix="give --rdzv-backend c10d, or leave it out, so that the nodes get the plan's order",
    )


def _numbered(command: LauncherCommand, hosts: Sequence[str], place: int) -> LauncherCommand:
    """The command for the static rendezvous, with the first host as the master."""
    command = _with(command, "--master-addr", hosts[0])
    command = _with(command, "--node-rank", str(place))
    return _with(command, "--nnodes", str(len(hosts)))


def _sorted(
    command: LauncherCommand, ranks: Mapping[str, int], environment: Mapping[str, str]
) -> LauncherCommand:
    """The command for the dynamic rendezvous, which then sorts the nodes by the order.

    It refuses nodes that differ from the order, unless it is told whether to.
    """
    if _value(command, environment, "nnodes") is None:
        command = _with(command, "--nnodes", str(len(ranks)))
    order = keep("".join(f"{host} slots={slots}\n" for host, slots in ranks.items()), "hostfile")
    given = _value(command, environment, "rdzv-conf")
    settings = [*(given.split(",") if given else []), f"{PLAN_SETTING}={order.absolute()}"]
    told = {setting.partition("=")[0].strip() for setting in settings}
    if STRICT_SETTING not in told and STRICT_VARIABLE not in environment:
        settings.append(f"{STRICT_SETTING}=true")
    command = _with(command, "--rdzv-conf", ",".join(settings))
    return _with(command, "--rdzv-backend", BACKEND)


def _is_standalone(command: LauncherCommand, environment: Mapping[str, str]) -> bool:
    told = environment.get("PET_STANDALONE", "0") not in ("", "0")
    return told or command.option("--standalone") is not None


def _check_number(
    name: str, planned: str, command: LauncherCommand, environment: Mapping[str, str]
) -> None:
    """Whether the command leaves a number open or gives the planned one."""
    given = _value(command, environment, name)
    if given not in (None, planned, f"{planned}:{planned}"):
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
