"""Any known topology file to a cluster; the content tells which it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trimtab.core.cluster import MAX_CLUSTER_VALUES, Cluster
from trimtab.core.documents import json_lines, parse_json, parse_yaml, read_text, validate
from trimtab.core.errors import BadInput
from trimtab.core.topology import ibnetdiscover, kubernetes, measured, nccl, slurm, topograph
from trimtab.core.topology.assumptions import Assumed
from trimtab.core.topology.draft import Draft
from trimtab.core.topology.json_places import Places
from trimtab.core.topology.safe_xml import parse_xml

MAX_TOPOLOGY_BYTES = 64 * 2**20

MAX_JSON_BYTES = 256 * 2**20
"""A node of Kubernetes with its list of images has 13 kB and more; reading takes twice the file."""

MAX_JSON_MARKS = 2**24
"""Commas and brackets of the largest JSON: each may be a value of some 100 bytes in memory."""

FORMATS = (
    "a trimtab cluster (YAML)",
    "Slurm's topology.conf or topology.yaml",
    "NVIDIA Topograph's graph (JSON)",
    "kubectl get nodes -o json",
    "an NCCL topology or graph dump (XML)",
    "ibnetdiscover's output",
    "a measured bandwidth matrix (JSON or CSV)",
    "a DeepSpeed hostfile",
)
"""What `read_topology` reads, as people call it."""

_CONF = re.compile(r"(SwitchName|BlockName|BlockSizes)\s*=", re.I)
_FABRIC = re.compile(r'(vendid=0x|(Switch|Ca|Rt)\s+\d+\s+")')
_HOSTFILE = re.compile(r"\S+\s+slots=")
_BEGINNING = re.compile(r"\s*(\S)")
_CLUSTER = re.compile(r"^nodes\s*:", re.M)
_TABLE = re.compile(r"[^,:{}]*(,[^,:{}]+)+")


def read_topology(path: str | Path, assumed: Assumed | None = None) -> Cluster:
    """Reads a cluster from any of `FORMATS`.

    Args:
        path: the file.
        assumed: figures for what it leaves open; a trimtab cluster and a hostfile say all.

    Raises:
        BadInput: it is of no known format, or malformed; the sentence names the file and line.
        Unsupported: it is of a known format and says nothing that a cluster could be made of.
    """
    source, given = str(path), assumed or Assumed()
    text = _text(path)
    found = _found(text, source, path, given)
    return found if isinstance(found, Cluster) else found.cluster(Path(path).name, given)


def _text(path: str | Path) -> str:
    smaller = f"give a smaller one; {kubernetes.SHRINK} keeps of Kubernetes nodes what is read"
    text = read_text(path, max_bytes=MAX_JSON_BYTES, smaller=smaller)
    if len(text) > MAX_TOPOLOGY_BYTES and not _is_json(text):
        raise BadInput(
            f"the file is larger than {MAX_TOPOLOGY_BYTES:,} bytes and no JSON",
            where=str(path),
            fix="give a smaller one",
        )
    return text


def _is_json(text: str) -> bool:
    beginning = _BEGINNING.match(text)
    return beginning is not None and beginning[1] in "{["


def _json(text: str, source: str) -> Any:
    if len(text) > MAX_JSON_MARKS and sum(map(text.count, ",[{")) > MAX_JSON_MARKS:
        raise BadInput(
            f"there are more than {MAX_JSON_MARKS:,} values",
            where=source,
            fix="give a smaller file",
        )
    return parse_json(text, where=source, without=kubernetes.UNREAD)


def _found(text: str, source: str, path: str | Path, assumed: Assumed) -> Draft | Cluster:
    if _is_json(text):
        return _of_data(_json(text, source), Places(text, source), path)
    if text.lstrip()[:1] == "<":
        return _of_xml(text, source)
    line = _first_line(text)
    if _CONF.match(line):
        return slurm.draft_of_conf(text, source, assumed)
    if _FABRIC.match(line):
        return ibnetdiscover.draft_of_fabric(text, source)
    if _HOSTFILE.match(line):
        return _of_hostfile(path, assumed)
    if _TABLE.fullmatch(line):
        return measured.draft_of_measurement(measured.measurement_of_csv(text, source), source)
    if _CLUSTER.search(text):
        return Cluster.read(path)
    return _of_yaml(text, source, path, assumed)


def _first_line(text: str) -> str:
    lines = (line.strip() for line in text.split("\n"))
    return next((line for line in lines if line and not line.startswith("#")), "")


def _of_xml(text: str, source: str) -> Draft:
    root = parse_xml(text, where=source)
    if root.tag == "system":
        return nccl.draft_of_system(root, source)
    if root.tag == "graphs":
        return nccl.draft_of_graphs(root, source)
    raise _unknown(f"{source}:{root.line}", f"the XML begins with <{root.tag}>")


def _of_data(data: Any, places: Places, path: str | Path) -> Draft | Cluster:
    """What JSON stands for, or YAML whose keys are those of JSON."""
    if isinstance(data, dict):
        if "instances" in data:
            return topograph.draft_of_instances(data, places)
        if "items" in data or data.get("kind") == "Node":
            return kubernetes.draft_of_nodes(data, places)
        if "bandwidth_bytes_per_s" in data:
            found = validate(
                measured.Measurement,
                data,
                where=places.source,
                lines=lambda: json_lines(places.text),
            )
            return measured.draft_of_measurement(found, places.source)
        if "nodes" in data:
            return Cluster.read(path)
    raise _unknown(places.source, "this is no known topology")


def _of_yaml(text: str, source: str, path: str | Path, assumed: Assumed) -> Draft | Cluster:
    data, lines = parse_yaml(text, where=source, max_nodes=MAX_CLUSTER_VALUES)
    topologies = isinstance(data, list) and data and isinstance(data[0], dict)
    if topologies and "topology" in data[0]:
        return slurm.draft_of_yaml(data, lines, source, assumed)
    return _of_data(data, Places(text, source), path)


def _of_hostfile(path: str | Path, assumed: Assumed) -> Cluster:
    return Cluster.from_hostfile(
        path,
        device=assumed.device,
        bandwidth_bytes_per_s=assumed.bandwidth_bytes_per_s,
        latency_s=2 * assumed.latency_s,
    )


def _unknown(where: str, what: str) -> BadInput:
    return BadInput(what, where=where, fix=f"give {', '.join(FORMATS[:-1])}, or {FORMATS[-1]}")
