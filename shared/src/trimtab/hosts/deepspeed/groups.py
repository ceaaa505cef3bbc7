"""The groups of ranks that DeepSpeed's own classes make."""

from __future__ import annotations

import sys
from typing import Any


def topology_of(layout: Any) -> Any | None:
    """The ``ProcessTopology`` that a topology, a ``PipelineParallelGrid`` or an engine has.

    None where it is none of these. Nothing of DeepSpeed is imported.
    """
    if hasattr(layout, "get_axis_comm_lists"):
        return layout
    if hasattr(layout, "get_pipe_parallel_group") and callable(getattr(layout, "topology", None)):
        return layout.topology()
    grid = getattr(layout, "grid", None)
    return None if grid is None else topology_of(grid)


def live_topology() -> Any | None:
    """The ``ProcessTopology`` of the engine that this process has made; None where it made none."""
    groups = sys.modules.get("deepspeed.utils.groups")
    units = getattr(groups, "mpu", None)
    return None if units is None else topology_of(units)


def topology_groups(topology: Any) -> dict[str, list[list[int]]]:
    """The groups of global ranks along each axis of a ``ProcessTopology``, by the axis' name.

    Axes of one element have groups of one rank, which DeepSpeed leaves out.
    """
    everyone = range(topology.world_size())
    return {
        axis: topology.get_axis_comm_lists(axis) or [[rank] for rank in everyone]
        for axis in topology.get_axis_names()
    }
