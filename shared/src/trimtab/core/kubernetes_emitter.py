"""A JobSet for Kubernetes: one pod on each node of a plan, numbered by torchrun as the plan says.

Pods cannot choose their index, so it is not relied upon: the hostfile goes along as a ConfigMap,
and trimtab's rendezvous orders the nodes by it. Kueue's annotations tell its topology-aware
scheduling which runs of consecutive nodes share a domain.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from trimtab.core.errors import Unsupported
from trimtab.core.plan import Plan
from trimtab.core.planned_nodes import PlannedNode, require_even, training_nodes

TIER_LABEL = "fabric.topograph.run/tier-{}"
"""The node label of a tier of switches, the closest numbered 0; NVIDIA Topograph sets it."""

IMAGE = "registry.example.com/training:latest"
QUEUE = "user-queue"
PORT = 29500

_HEAD = f"""\
# Set the image (it needs trimtab-core), the queue and the arguments of the job.
# {TIER_LABEL.format("N")} are NVIDIA Topograph's labels: put your cluster's in their place.
# Then: kubectl apply --server-side -f jobset.yaml (else it keeps a copy, of at most 256 KiB).
"""

Paths = Mapping[str, Sequence[str]]
"""The domains around each node, the widest first."""


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as such."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def kubernetes(plan: Plan) -> dict[str, str]:
    """One YAML file with a ConfigMap of the order of nodes, and a JobSet.

    Raises:
        BadInput: the plan has no ranks.
        Unsupported: torchrun cannot number ranks as the plan does.
    """
    nodes = training_nodes(plan, "torchrun")
    require_even(nodes, "torchrun", "slurm")
    for node in nodes:
        if list(node.devices) != list(range(len(node.devices))):
            raise Unsupported(
                f"the ranks of node {node.name!r} are on devices {list(node.devices)}",
                fix="a pod gets the devices from 0; emit for slurm instead",
            )
    name = _job_name(plan)
    documents = [_config_map(name, nodes), _job_set(name, nodes, _paths(plan))]
    text: str = yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, width=1000, explicit_start=True
    )
    return {"jobset.yaml": _HEAD + text}


def _job_name(plan: Plan) -> str:
    job = plan.details.get("job")
    name = job.get("name") if isinstance(job, dict) else None
    cleaned = re.sub(r"[^a-z0-9]+", "-", str(name or "training").lower())[:40].strip("-")
    return cleaned or "training"


def _config_map(name: str, nodes: Sequence[PlannedNode]) -> dict[str, Any]:
    hostfile = "".join(f"{node.name} slots={len(node.devices)}\n" for node in nodes)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-order"},
        "data": {"hostfile": hostfile},
    }


def _job_set(name: str, nodes: Sequence[PlannedNode], paths: Paths) -> dict[str, Any]:
    template = {
        "metadata": {"annotations": topology_annotations([n.name for n in nodes], paths)},
        "spec": _pod(name, nodes),
    }
    job = {
        "parallelism": len(nodes),
        "completions": len(nodes),
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": template,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "labels": {"kueue.x-k8s.io/queue-name": QUEUE}},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "replicatedJobs": [{"name": "workers", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _pod(name: str, nodes: Sequence[PlannedNode]) -> dict[str, Any]:
    devices = len(nodes[0].devices)
    command = ["torchrun", "--nnodes", str(len(nodes)), "--nproc-per-node", str(devices)]
    command += ["--rdzv-backend", "trimtab", "--rdzv-id", name]
    command += ["--rdzv-endpoint", f"{name}-workers-0-0.{name}:{PORT}"]
    chosen = {"key": "kubernetes.io/hostname", "operator": "In", "values": [n.name for n in nodes]}
    return {
        "restartPolicy": "Never",
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": [chosen]}]
                }
            },
            "podAntiAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "labelSelector": {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": name}},
                        "topologyKey": "kubernetes.io/hostname",
                    }
                ]
            },
        },
        "containers": [
            {
                "name": "training",
                "image": IMAGE,
                "command": command,
                "args": ["train.py"],
                "env": [
                    {"name": "TRIMTAB_PLAN", "value": "/etc/trimtab/hostfile"},
                    {
                        "name": "TRIMTAB_HOST",
                        "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}},
                    },
                ],
                "ports": [{"containerPort": PORT}],
                "resources": {"limits": {"nvidia.com/gpu": devices}},
                "volumeMounts": [{"name": "order", "mountPath": "/etc/trimtab"}],
            }
        ],
        "volumes": [{"name": "order", "configMap": {"name": f"{name}-order"}}],
    }


def topology_annotations(order: Sequence[str], paths: Paths) -> dict[str, str]:
    """What Kueue is to keep together.

    Args:
        order: the nodes by node rank.
        paths: the domains around each node, the widest first; nothing is asked where a node has
            none.

    Returns:
        The closest tier of which one domain holds all nodes is required. Else the widest tier is
        preferred, and slices are required: the longest runs of equal length that the closest
        possible tier holds together.
    """
    around = [list(reversed(paths.get(node, ()))) for node in order]
    depth = min(map(len, around), default=0)
    if not depth:
        return {}
    tiers = [[path[tier] for path in around] for tier in range(depth)]
    whole = next((tier for tier, domains in enumerate(tiers) if len(set(domains)) == 1), None)
    if whole is not None:
        return {"kueue.x-k8s.io/podset-required-topology": TIER_LABEL.format(whole)}
    annotations = {"kueue.x-k8s.io/podset-preferred-topology": TIER_LABEL.format(depth - 1)}
    for tier, domains in enumerate(tiers):
        size = _slice_size(domains)
        if size > 1:
            annotations["kueue.x-k8s.io/podset-slice-required-topology"] = TIER_LABEL.format(tier)
            annotations["kueue.x-k8s.io/podset-slice-size"] = str(size)
            break
    return annotations


def _slice_size(domains: Sequence[str]) -> int:
    """The length of the longest equal runs that lie in one domain each."""
    ends = [i for i in range(1, len(domains)) if domains[i] != domains[i - 1]]
    return math.gcd(len(domains), *ends)


def _paths(plan: Plan) -> dict[str, list[str]]:
    """The domains that a placement plan says are around its nodes."""
    given = plan.details.get("paths")
    if not isinstance(given, dict):
        return {}
    return {
        node: [str(name) for name in path] for node, path in given.items() if isinstance(path, list)
    }
