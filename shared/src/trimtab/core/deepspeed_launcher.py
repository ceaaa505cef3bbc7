"""How many hosts DeepSpeed's launcher can start: for what writes its files and what wraps it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

PDSH_FAN_OUT = 1024
"""Hosts on which DeepSpeed lets pdsh start the job at once; more than these would wait for it."""

ARGUMENT_BYTES = 128 * 1024
"""What Linux takes as one argument of a command (``MAX_ARG_STRLEN``)."""

REST_BYTES = 16 * 1024
"""Room for the rest of the command that goes to a host: its variables, folder and script."""


def fits_pdsh(devices: Mapping[str, Sequence[int]]) -> bool:
    """Whether DeepSpeed can start these hosts through pdsh.

    It tells each host the devices of all, in one argument; Open MPI reads them from the hostfile.

    Args:
        devices: the devices of each host.
    """
    return world_info_bytes(devices) + REST_BYTES <= ARGUMENT_BYTES


def world_info_bytes(devices: Mapping[str, Sequence[int]]) -> int:
    """The length of DeepSpeed's ``--world_info``: the devices of each host as JSON in base 64."""
    told = json.dumps({host: list(numbers) for host, numbers in devices.items()})
    return 4 * math.ceil(len(told) / 3)
