"""Clusters back to files."""

from __future__ import annotations

from pathlib import Path

import yaml

from trimtab.core.cluster import Cluster
from trimtab.core.documents import write_atomic


def cluster_yaml(cluster: Cluster) -> str:
    """The YAML that `Cluster.read` reads back; a line for each node and link."""
    data = cluster.model_dump(mode="json", exclude_defaults=True)
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(
        data,
        Dumper=dumper,
        sort_keys=False,
        default_flow_style=None,
        width=1000,
        allow_unicode=True,
    )
    return text


def write_cluster(cluster: Cluster, path: str | Path) -> None:
    """Writes a cluster file, whole or not at all.

    Raises:
        BadInput: the folder is missing or may not be written, or the disk is full.
    """
    write_atomic(path, cluster_yaml(cluster))
