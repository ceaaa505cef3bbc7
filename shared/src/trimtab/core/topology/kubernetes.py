"""Kubernetes node labels, from ``kubectl get nodes -o json`` (or ``-o yaml``).

Labels are read from the first of the known families that a node has; the nodes' zones are the
widest tier where there are several.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from trimtab.core.documents import shown
from trimtab.core.errors import BadInput
from trimtab.core.topology.assumptions import STATE_LABEL
from trimtab.core.topology.draft import Draft, Host, draft_of_paths, known_device
from trimtab.core.topology.json_places import Places, text_of
from trimtab.core.topology.topograph import DOMAIN_LABEL

UNREAD = frozenset(("images", "annotations", "managedFields"))
"""Keys of a node that say nothing here and make up most of it."""

SHRINK = (
    "jq -c '.items[] |= {metadata: (.metadata | {name, labels}),"
    " spec: (.spec | {unschedulable, taints}),"
    " status: (.status | {capacity, allocatable, conditions})}'"
)
"""A command that keeps of ``kubectl get nodes -o json`` what is read, and taints and capacities."""

ZONE = "topology.kubernetes.io/zone"
PRODUCT = "nvidia.com/gpu.product"

_NUMBERED = (
    # The tier of the switch next to the node is the lowest here ...
    (re.compile(r"fabric\.topograph\.run/tier-(\d{1,3})"), 1),
    (re.compile(r"network\.topology\.nvidia\.com/tier-(\d{1,3})"), 1),
    # ... and the highest here.
    (re.compile(r"topology\.k8s\.aws/network-node-layer-(\d{1,3})"), -1),
)

_NAMED = (
    tuple(f"network.topology.nvidia.com/{tier}" for tier in ("leaf", "spine", "core")),
    tuple(f"network.topology.nvidia.com/{tier}" for tier in ("block", "spine", "datacenter")),
    ("cloud.google.com/gce-topology-subblock", "cloud.google.com/gce-topology-block"),
    ("cloud.provider.com/topology-rack", "cloud.provider.com/topology-block"),
    ("topology.kubernetes.io/rack",),
    ("rack",),
)
"""Families of labels, the closest tier first."""

_KEPT = (ZONE, "node.kubernetes.io/instance-type", PRODUCT, DOMAIN_LABEL)


def draft_of_nodes(data: dict[str, Any], places: Places) -> Draft:
    """The tree that the labels of nodes form; without such labels all hang on one switch.

    Nodes without accelerators are left out where others have some. Nodes that take no work
    (cordoned, or not ready) are marked as drained.

    Raises:
        BadInput: it names the line, and what would be right.
    """
    single = data.get("kind") == "Node"
    items = [data] if single else places.expect(data.get("items"), list, "items")
    nodes: dict[str, tuple[dict[str, Any], str]] = {}
    for index, raw in enumerate(items):
        at: tuple[str | int, ...] = () if single else ("items", index)
        node = places.expect(raw, dict, *at)
        metadata = places.expect(node.get("metadata"), dict, *at, "metadata")
        name = places.expect(metadata.get("name"), str, *at, "metadata", "name")
        if name in nodes:
            raise BadInput(f"the node {name!r} is given twice", where=places.at(*at))
        nodes[name] = (node, places.at(*at))
    nodes = _accelerated(nodes)
    hosts = {name: _host(node, where) for name, (node, where) in nodes.items()}
    labels = {name: _labels(node) for name, (node, _) in nodes.items()}
    paths, qualified = _paths(labels, hosts)
    kept = {name: host for name, host in hosts.items() if name in paths}
    return draft_of_paths(places.source, paths, kept, qualified=qualified)


def _accelerated(
    nodes: Mapping[str, tuple[dict[str, Any], str]],
) -> dict[str, tuple[dict[str, Any], str]]:
    having = {name: found for name, found in nodes.items() if _gpus(*found)}
    return having or dict(nodes)


def _gpus(node: Mapping[str, Any], where: str) -> int | None:
    allocatable = _below(node, "status").get("allocatable")
    for key in ("nvidia.com/gpu", "amd.com/gpu"):
        value = allocatable.get(key) if isinstance(allocatable, dict) else None
        if value is not None:
            if not re.fullmatch(r"\d{1,9}", str(value), re.ASCII) or int(value) > 1024:
                raise BadInput(f"{key} is {shown(value)}", where=where, fix="give a whole number")
            return int(value)
    return None


def _host(node: Mapping[str, Any], where: str) -> Host:
    labels = _labels(node)
    kept = {key: labels[key] for key in _KEPT if key in labels}
    if not _takes_work(node):
        kept[STATE_LABEL] = "drained"
    product = labels.get(PRODUCT)
    device = known_device([product]) if product else None
    return Host(where, device=device, count=_gpus(node, where) or None, labels=kept)


def _takes_work(node: Mapping[str, Any]) -> bool:
    if _below(node, "spec").get("unschedulable") is True:
        return False
    conditions = _below(node, "status").get("conditions")
    ready = [
        condition.get("status")
        for condition in (conditions if isinstance(conditions, list) else [])
        if isinstance(condition, dict) and condition.get("type") == "Ready"
    ]
    return ready in ([], ["True"])


def _below(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def _labels(node: Mapping[str, Any]) -> dict[str, str]:
    given = _below(_below(node, "metadata"), "labels")
    return {key: value for key in given if (value := text_of(given, key))}


def _paths(
    labels: Mapping[str, Mapping[str, str]], hosts: Mapping[str, Host]
) -> tuple[dict[str, list[str]], bool]:
    """The domains of each node, the closest first, and whether their names are only locally so."""
    present = {key for of_node in labels.values() for key in of_node}
    keys, qualified = _family(present)
    paths: dict[str, list[str]] = {}
    for name, of_node in labels.items():
        # Fabrics of unequal depth: a node may lack the widest tiers, not one in between.
        known = list(takewhile(of_node.__contains__, keys))
        lost = next((key for key in keys[len(known) :] if key in of_node), None)
        if lost is None and (known or not keys):
            paths[name] = [of_node[key] for key in known]
        elif hosts[name].labels.get(STATE_LABEL) != "drained":
            raise BadInput(
                f"the node {name!r} has no label {keys[len(known)]}, which others have",
                where=hosts[name].where,
                fix="label it, or leave it out with kubectl's --selector",
            )
    return _with_zones(paths, labels), qualified


def _family(present: set[str]) -> tuple[list[str], bool]:
    """The labels of one family that some node has, the closest first."""
    for pattern, sign in _NUMBERED:
        tiers = {key: sign * int(m[1]) for key in present if (m := pattern.fullmatch(key))}
        if tiers:
            return sorted(tiers, key=tiers.__getitem__), False
    for family in _NAMED:
        keys = [key for key in family if key in present]
        if keys:
            return keys, True
    return [], True


def _with_zones(
    paths: Mapping[str, Sequence[str]], labels: Mapping[str, Mapping[str, str]]
) -> dict[str, list[str]]:
    zones = {of_node.get(ZONE) for name, of_node in labels.items() if name in paths}
    if len(zones) < 2 or None in zones:
        return {name: list(path) for name, path in paths.items()}
    return {name: [*path, labels[name][ZONE]] for name, path in paths.items()}
