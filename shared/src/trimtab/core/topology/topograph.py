"""The instances that NVIDIA Topograph's graph engine writes as JSON.

Its Slurm engines write topology.conf and topology.yaml; its Kubernetes engine writes node labels.
"""

from __future__ import annotations

from typing import Any

from trimtab.core.errors import BadInput
from trimtab.core.topology.draft import Draft, Host, draft_of_paths, known_device
from trimtab.core.topology.json_places import Places, text_of

DOMAIN_LABEL = "accelerator.topograph.run/domain"
"""The label of the NVLink domain that a node is in."""

_PRODUCTS = ("nvidia.com/gpu.product", "example.com/gpu-product")


def draft_of_instances(data: dict[str, Any], places: Places) -> Draft:
    """The tree of ``instances[].network_layers``, which are closest first.

    Raises:
        BadInput: it names the line, and what would be right.
    """
    paths: dict[str, list[str]] = {}
    hosts: dict[str, Host] = {}
    instances = places.expect(data["instances"], list, "instances")
    for index, raw in enumerate(instances):
        at = ("instances", index)
        instance = places.expect(raw, dict, *at)
        name = text_of(instance, "id")
        if not name:
            raise BadInput("an instance has no id", where=places.at(*at), fix="add its id")
        if name in paths:
            raise BadInput(
                f"the instance {name!r} is given twice",
                where=places.at(*at),
                fix="give each instance once",
            )
        layers = places.expect(instance.get("network_layers") or [], list, *at, "network_layers")
        paths[name] = [places.expect(layer, str, *at, "network_layers") for layer in layers]
        hosts[name] = _host(instance, places.at(*at))
    return draft_of_paths(places.source, paths, hosts, qualified=False)


def _host(instance: dict[str, Any], where: str) -> Host:
    given = {**_texts(instance.get("attributes")), **_texts(instance.get("labels"))}
    kinds = [text_of(instance, "type"), *(given.get(key) for key in _PRODUCTS)]
    labels = {}
    domain = given.get(DOMAIN_LABEL) or given.get("nvlink")
    if domain:
        labels[DOMAIN_LABEL] = domain
    return Host(where, device=known_device(filter(None, kinds)), labels=labels)


def _texts(value: Any) -> dict[str, str]:
    items = value.items() if isinstance(value, dict) else ()
    return {key: text for key, text in items if isinstance(text, str)}
