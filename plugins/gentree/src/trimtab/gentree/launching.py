"""A training job whose ranks know the network that the backend ``gentree`` plans for."""

from __future__ import annotations

from pathlib import Path

from trimtab.core.collectives import NetworkTree
from trimtab.core.launch import LaunchChange, LaunchRequest
from trimtab.core.topology import read_topology
from trimtab.gentree.backend import (
    ALWAYS_VARIABLE,
    CONSTANTS_VARIABLE,
    CUDA_VARIABLE,
    TOPOLOGY_VARIABLE,
)
from trimtab.gentree.config import GentreeConfig
from trimtab.gentree.constants_file import read_constants
from trimtab.hosts.job_variables import BACKEND_VARIABLE


def launch_change(config: GentreeConfig, request: LaunchRequest) -> LaunchChange:
    """The variables by which DeepSpeed takes the backend, and every rank finds the network.

    Raises:
        BadInput: a file cannot be read, the links form no tree, or a host is none of its nodes.
    """
    cluster = read_topology(config.topology)
    slots = [(host, index) for host, count in request.hosts.items() for index in range(count)]
    NetworkTree.of_cluster(cluster, slots or None)
    variables = {
        BACKEND_VARIABLE: "gentree",
        TOPOLOGY_VARIABLE: str(Path(config.topology).absolute()),
    }
    if config.constants is not None:
        read_constants(config.constants)
        variables[CONSTANTS_VARIABLE] = str(Path(config.constants).absolute())
    if config.always:
        variables[ALWAYS_VARIABLE] = "1"
    if config.cuda:
        variables[CUDA_VARIABLE] = "1"
    return LaunchChange(environment=variables)
