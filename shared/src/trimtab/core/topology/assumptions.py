"""What is taken for granted where a topology file says nothing."""

from __future__ import annotations

from dataclasses import dataclass

STATE_LABEL = "state"
"""The label of a cluster's node that says its state, such as ``drained``."""

MAX_HOSTS = 65_536
"""More hosts than this are refused, as are more switches."""


@dataclass(frozen=True, slots=True)
class Assumed:
    """Figures for what a file leaves open.

    Attributes:
        device: the profile of each node's devices.
        devices_per_node: how many a node has.
        bandwidth_bytes_per_s: of a node's link to a switch; by default 400 Gb/s, one NDR port.
        latency_s: of a message over one link.
        oversubscription: how much more the links below a switch carry than those above it.
    """

    device: str = "H100-SXM"
    devices_per_node: int = 8
    bandwidth_bytes_per_s: float = 50e9
    latency_s: float = 1e-6
    oversubscription: float = 1.0
