"""torchrun: the order of its nodes.

Each node runs its own torchrun, and the static rendezvous numbers them as they are told.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

from trimtab.core.errors import BadInput, Unsupported
from trimtab.hosts.launcher_command import LauncherCommand

HOST_VARIABLE = "TRIMTAB_HOST"
"""The name by which a plan knows this machine, where it is not its host name."""


def with_hosts(
    command: LauncherCommand, ranks: Mapping[str, int], environment: Mapping[str, str]
) -> LauncherCommand:
    """The command of this node with its place in the order, and the first host as the master.

    Args:
        command: torchrun's command on this node.
        ranks: how many ranks each host gets, in rank order.
        environment: the environment it will run in.

    Raises:
        BadInput: this node is not in the order, or the command contradicts it.
        Unsupported: torchrun cannot number ranks in this way.
    """
    _check_rendezvous(command, environment)
    hosts = list(ranks)
    _check_number("nnodes", str(len(hosts)), command, environment)
    if len(set(ranks.values())) > 1:
        raise Unsupported(
            f"the hosts get {sorted(set(ranks.values()))} ranks each",
            fix="torchrun needs as many on every host; launch with deepspeed",
        )
    processes = str(ranks[hosts[0]])
    _check_number("nproc-per-node", processes, command, environment)
    place = str(_place(hosts, environment))
    for option, value in (
        ("--master-addr", hosts[0]),
        ("--node-rank", place),
        ("--nproc-per-node", processes),
        ("--nnodes", str(len(hosts))),
    ):
        command = command.with_option((option,), value, as_=option)
    return command


def _check_rendezvous(command: LauncherCommand, environment: Mapping[str, str]) -> None:
    """Whether the nodes are numbered as they are told: other rendezvous sort them by name."""
    standalone = command.option("--standalone") is not None or (
        environment.get("PET_STANDALONE", "0") not in ("", "0")
    )
    rendezvous = _value(command, environment, "rdzv-backend") or "static"
    if standalone or rendezvous != "static":
        named = "--standalone" if standalone else f"--rdzv-backend {rendezvous}"
        raise Unsupported(
            f"{named} numbers the nodes by itself",
            fix="leave it out, so that the nodes get the order of the plan",
        )


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


def _place(order: Sequence[str], environment: Mapping[str, str]) -> int:
    """This machine's index in the order; a host name matches with or without its domain."""
    own = environment.get(HOST_VARIABLE) or socket.gethostname()
    for name, candidates in ((own, order), (_short(own), [_short(host) for host in order])):
        if candidates.count(name) == 1:
            return candidates.index(name)
    raise BadInput(
        f"this machine, {own!r}, is not one host of the plan",
        fix=f"set {HOST_VARIABLE} to one of {', '.join(order[:20])}",
    )


def _short(host: str) -> str:
    """A host name without its domain; an address stays whole."""
    return host if host.replace(".", "").isdigit() else host.partition(".")[0]
