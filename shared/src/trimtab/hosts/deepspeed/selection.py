"""Which hosts and devices of a hostfile the options of DeepSpeed's launcher choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trimtab.core.errors import BadInput
from trimtab.hosts.launcher_command import LauncherCommand

EXCLUDE = ("-e", "--exclude")

_INCLUDE = ("-i", "--include")
_HOSTS = ("--num-nodes",)
_DEVICES = ("--num-gpus", "--num-accelerators")

Devices = dict[str, list[int]]
"""Devices by host; none stand for all of them."""


def selected(command: LauncherCommand, slots: Mapping[str, int]) -> dict[str, int]:
    """How many ranks the launcher would start on each host of a hostfile, in its order.

    Args:
        command: the launcher's command.
        slots: the hostfile's slots of each host.

    Raises:
        BadInput: ``--include`` or ``--exclude`` is malformed.
    """
    devices = {host: range(count) for host, count in slots.items()}
    included, excluded = _named(command, _INCLUDE), _named(command, EXCLUDE)
    counts = {host: len(numbers) for host, numbers in devices.items()}
    if included is not None:
        chosen = {host: len(set(included[host])) for host in counts if host in included}
        counts = {host: number or counts[host] for host, number in chosen.items()}
    elif excluded is not None:
        kept = {host: _without(devices[host], excluded.get(host)) for host in devices}
        counts = {host: len(numbers) for host, numbers in kept.items() if numbers}
    hosts, each = _number(command, _HOSTS), _number(command, _DEVICES)
    return {host: each or counts[host] for host in list(counts)[:hosts]}


def check_selection(command: LauncherCommand, ranks: Mapping[str, int]) -> None:
    """Goes on only if the options leave a plan's hosts and devices as they are.

    Args:
        command: the launcher's command.
        ranks: how many ranks the plan gives each host, on its first devices.

    Raises:
        BadInput: they choose others, or are malformed.
    """
    _check_included(_named(command, _INCLUDE), ranks)
    for host, devices in (_named(command, EXCLUDE) or {}).items():
        if host in ranks and (not devices or min(devices) < ranks[host]):
            raise BadInput(
                f"--exclude leaves out {'devices of ' if devices else ''}{host!r},"
                " where the plan has ranks",
                fix="leave it out, or plan again without them",
            )
    each = sorted(set(ranks.values()))
    for name, given, planned in (
        ("--num_nodes", _number(command, _HOSTS), [len(ranks)]),
        ("--num_gpus", _number(command, _DEVICES), each),
    ):
        if given is not None and [given] != planned:
            right = " or ".join(map(str, planned))
            raise BadInput(
                f"{name} is {given}, where the plan has {right}",
                fix="leave it out" if planned[1:] else f"give {right}, or leave it out",
            )


def _check_included(included: Devices | None, ranks: Mapping[str, int]) -> None:
    if included is None:
        return
    for host in [*included, *ranks]:
        if host not in included:
            differs = f"leaves out {host!r}, where the plan has ranks"
        elif host not in ranks:
            differs = f"names {host!r}, which the plan does not"
        elif included[host] and sorted(set(included[host])) != [*range(ranks[host])]:
            differs = f"chooses other devices of {host!r} than the plan"
        else:
            continue
        raise BadInput(f"--include {differs}", fix="leave it out: the plan names its hosts")


def _named(command: LauncherCommand, names: Sequence[str]) -> Devices | None:
    """What ``HOST@HOST:0,1`` names; None where the option is not given."""
    text = command.option(*names)
    if not text:
        return None
    found: Devices = {}
    for part in text.split("@"):
        host, colon, numbers = part.partition(":")
        try:
            found.setdefault(host, []).extend(map(int, numbers.split(",") if colon else ()))
        except ValueError:
            raise BadInput(
                f"{names[1]} has {part[:80]!r}, which is no host with devices",
                fix="write HOST@HOST:0,1",
            ) from None
    return found


def _without(devices: range, excluded: Sequence[int] | None) -> list[int]:
    if excluded is None:
        return list(devices)
    return [device for device in devices if excluded and device not in excluded]


def _number(command: LauncherCommand, names: Sequence[str]) -> int | None:
    """A number above 0; one that is none is the launcher's to judge."""
    try:
        number = int(command.option(*names) or 0)
    except ValueError:
        return None
    return number if number > 0 else None
