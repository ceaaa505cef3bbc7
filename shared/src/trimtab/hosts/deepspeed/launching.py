"""DeepSpeed's launcher: the order of its hosts, and the variables that reach all of them.

The launcher numbers the ranks by walking its hostfile, so a hostfile in another order is all
that a placement needs. It starts the hosts itself: whether they can be reached is its to say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from trimtab.core.cache import keep
from trimtab.core.deepspeed_launcher import PDSH_FAN_OUT, fits_pdsh
from trimtab.core.documents import read_lines
from trimtab.core.errors import BadInput, Unsupported
from trimtab.hosts.deepspeed.selection import EXCLUDE, check_selection, selected
from trimtab.hosts.launcher_command import LauncherCommand

DEFAULT_HOSTFILE = "/job/hostfile"

_HOSTFILE = ("-H", "--hostfile")
_MASTER = ("--master-addr",)
_NODE_RANK = ("--node-rank",)
_ARGUMENTS = ("--launcher-args",)
_ENVIRONMENT_FILE = "DS_ENV_FILE"


def hosts(command: LauncherCommand) -> dict[str, int]:
    """The ranks of each host that the launcher would use, in its order; empty without a hostfile.

    Raises:
        BadInput: the hostfile is one that the launcher would refuse.
    """
    return selected(command, listed(command))


def listed(command: LauncherCommand) -> dict[str, int]:
    """The slots of each host of the launcher's hostfile, in its order; empty without a hostfile.

    Raises:
        BadInput: the hostfile is one that the launcher would refuse.
    """
    path = _hostfile(command)
    return read_hostfile(path) if path is not None else {}


def starts_here(command: LauncherCommand, hosts: Collection[str]) -> bool:
    """Whether the launcher starts ranks on this machine alone, whatever their host is called."""
    told = command.option("--force-multi") is not None or len(hosts) > 1
    return _is_without_ssh(command) or not told


def with_hosts(
    command: LauncherCommand, ranks: Mapping[str, int], given: Mapping[str, int], place: int | None
) -> LauncherCommand:
    """The command with a hostfile of its own, so that ranks are numbered in its order.

    Args:
        command: the launcher's command.
        ranks: how many ranks each host gets, in rank order.
        given: those that the command as it is would start; the same need no other hostfile.
        place: the index of this machine, where the launcher starts ranks here alone.

    Raises:
        BadInput: the options contradict the order, or the launcher's present hostfile lacks a
            host, or slots of one.
        Unsupported: the hosts are started by Slurm, which sorts them, or are too many.
    """
    runner = _runner(command, ranks)
    check_selection(command, ranks)
    if place is not None and _is_without_ssh(command):
        command = command.with_option(_NODE_RANK, str(place), as_="--node_rank")
    if runner == "pdsh" and len(ranks) > PDSH_FAN_OUT:
        passed = command.option(*_ARGUMENTS)
        wide = " ".join([*([passed] if passed else []), f"-f {len(ranks)}"])
        command = command.with_option(_ARGUMENTS, wide, as_="--launcher_args")
    if list(ranks.items()) == list(given.items()):
        return command
    _check_slots(_hostfile(command), ranks)
    if command.option(*_MASTER) is not None:
        command = command.with_option(_MASTER, next(iter(ranks)), as_="--master_addr")
    text = "".join(f"{host} slots={slots}\n" for host, slots in ranks.items())
    ordered = command.with_option(_HOSTFILE, str(keep(text, "hostfile")), as_="--hostfile")
    return ordered.without_option(EXCLUDE)  # of hosts that the hostfile has no longer


def _runner(command: LauncherCommand, ranks: Mapping[str, int]) -> str:
    """What starts the hosts, if that keeps their order and can start so many."""
    runner = (command.option("--launcher") or "pdsh").lower()
    if runner == "slurm":
        raise Unsupported(
            "deepspeed --launcher slurm leaves the order of the hosts to Slurm",
            fix="write trimtab launch --plan PLAN -- srun …, or leave --launcher out",
        )
    if runner == "pdsh" and not fits_pdsh({host: range(count) for host, count in ranks.items()}):
        raise Unsupported(
            f"DeepSpeed cannot name {len(ranks):,} hosts to pdsh in one argument",
            fix="give --launcher openmpi --launcher_args '--map-by slot', or launch with srun",
        )
    return runner


def _is_without_ssh(command: LauncherCommand) -> bool:
    """Whether the launcher runs on every node by itself."""
    return command.option("--no-ssh") is not None


def _check_slots(hostfile: Path | None, ranks: Mapping[str, int]) -> None:
    """Whether the hostfile that the user gave, if any, has room for the ranks."""
    if hostfile is None:
        return
    slots = read_hostfile(hostfile)
    for host, wanted in ranks.items():
        if wanted > slots.get(host, 0):
            has = f"slots={slots[host]}" if host in slots else "no line"
            raise BadInput(
                f"{wanted} ranks go to the host {host!r}, which has {has} there",
                where=str(hostfile),
                fix=f"write '{host} slots={wanted}'",
            )


def exporting(environment: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """The environment in which the launcher passes the added variables on to every host.

    The launcher exports few variables by itself; the rest it reads from a file.

    Raises:
        BadInput: a value cannot pass through the launcher's shell.
    """
    for name, value in added.items():
        if re.search(r'["$`\\\n]', value):
            raise BadInput(
                f"{name} is {value!r}, which DeepSpeed cannot pass on to other hosts",
                fix='give a value without ", $, `, \\ and line ends',
            )
    lines = [*_users_exports(environment), *(f"{name}={value}" for name, value in added.items())]
    path = keep("\n".join(lines), "deepspeed-env")
    return {**environment, **added, _ENVIRONMENT_FILE: str(path.absolute())}


def _users_exports(environment: Mapping[str, str]) -> list[str]:
    """The lines of the files that the launcher would read; ours takes their place."""
    name = environment.get(_ENVIRONMENT_FILE, ".deepspeed_env")
    # The same two folders in the same order as the launcher, where the later line wins.
    paths = [os.path.join(folder, name) for folder in (os.path.expanduser("~"), ".")]
    return [line for path in paths if os.path.isfile(path) for _, line in read_lines(path)]


def _hostfile(command: LauncherCommand) -> Path | None:
    path = Path(command.option(*_HOSTFILE) or DEFAULT_HOSTFILE)
    return path if path.is_file() else None


def read_hostfile(path: Path) -> dict[str, int]:
    """The slots of each host of a hostfile, in its order.

    Raises:
        BadInput: the file is one that the launcher would refuse.
    """
    slots: dict[str, int] = {}
    for number, line in read_lines(path):
        if line.lstrip().startswith("#"):
            continue
        entry = re.match(r"\s*(\S+)\s+slots=(\d+)", line)
        if entry is None:
            raise BadInput(
                f"{line.strip()[:80]!r} is no entry of a hostfile",
                where=f"{path}:{number}",
                fix="write HOST slots=N",
            )
        if entry[1] in slots:
            raise BadInput(
                f"the host {entry[1]!r} is given twice",
                where=f"{path}:{number}",
                fix="give it once",
            )
        slots[entry[1]] = int(entry[2])
    return slots
