"""Clusters from what people have: scheduler files, node labels, fabric dumps and measurements.

`read_topology` tells the formats apart by their content.
"""

from trimtab.core.topology.assumptions import STATE_LABEL, Assumed
from trimtab.core.topology.hostlist import expand, fold
from trimtab.core.topology.reading import FORMATS, read_topology
from trimtab.core.topology.writing import write_cluster

__all__ = [
    "FORMATS",
    "STATE_LABEL",
    "Assumed",
    "expand",
    "fold",
    "read_topology",
    "write_cluster",
]
