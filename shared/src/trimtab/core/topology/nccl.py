"""What NCCL writes of the machine it runs on: NCCL_TOPO_DUMP_FILE and NCCL_GRAPH_DUMP_FILE.

Both tell of the inside of a node: how its GPUs are joined, and which NICs it has. Each NIC becomes
a link to a switch of its own, its rail.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from trimtab.core.cluster import InsideLink
from trimtab.core.documents import shown
from trimtab.core.errors import BadInput
from trimtab.core.topology.draft import Cable, Draft, Host
from trimtab.core.topology.safe_xml import Element

_NVLINK_BYTES_PER_S = {60: 20e9, 70: 25e9, 80: 25e9, 86: 14.0625e9, 90: 25e9, 100: 50e9}
"""One NVLink in one direction, by compute capability; NVIDIA's architecture papers."""

_LANE_BYTES_PER_S = {
    2.5: 0.25e9,
    5: 0.5e9,
    8: 0.985e9,
    16: 1.969e9,
    32: 3.938e9,
    64: 7.563e9,
}
"""One PCIe lane in one direction by its GT/s, after encoding."""

_DEVICE_BY_SM = {80: "A100-80GB-SXM", 89: "L40S", 90: "H100-SXM"}
"""The device most found of a compute capability; a dump does not name it."""


def draft_of_system(root: Element, source: str) -> Draft:
    """The nodes of a topology dump: one, or each of an NVLink domain that spans several.

    Raises:
        BadInput: it names the line, and what would be right.
    """
    machines: dict[str, list[Element]] = {}
    for cpu in root.children:
        if cpu.tag == "cpu":
            machines.setdefault(cpu.attributes.get("host_hash", ""), []).append(cpu)
    draft = Draft(source)
    for index, cpus in enumerate(machines.values()):
        _add_machine(draft, _node_name(source, index, len(machines)), cpus)
    if not draft.hosts:
        raise BadInput("there is no cpu with GPUs", where=f"{source}:{root.line}")
    return draft


def draft_of_graphs(root: Element, source: str) -> Draft:
    """The node that a graph dump tells of: the ring's channels between GPUs and to NICs.

    Raises:
        BadInput: it names the line, and what would be right.
    """
    ring = next((g for g in root.each("graph") if g.attributes.get("id", "0") == "0"), None)
    if ring is None:
        raise BadInput("there is no graph 0, the ring", where=f"{source}:{root.line}")
    channels = [child for child in ring.children if child.tag == "channel"]
    gpus = {gpu.attributes.get("dev", "") for channel in channels for gpu in channel.each("gpu")}
    if not gpus:
        raise BadInput("the ring has no GPU", where=f"{source}:{ring.line}")
    intra = _number(ring, "speedintra", source) * 1e9
    inter = _number(ring, "speedinter", source) * 1e9
    name = _node_name(source, 0, 1)
    draft = Draft(source)
    inside = InsideLink(bandwidth_bytes_per_s=intra * len(channels)) if intra else None
    draft.add_host(name, Host(f"{source}:{ring.line}", count=len(gpus), inside=inside))
    # A channel leaves through its first NIC and comes back through its last.
    leaving = Counter(nets[0] for channel in channels if (nets := _devices(channel, "net")))
    for net, count in sorted(leaving.items()):
        _add_rail(draft, name, net, inter * count or None, f"{source}:{ring.line}")
    return draft


def _add_machine(draft: Draft, name: str, cpus: Sequence[Element]) -> None:
    pcis = [pci for cpu in cpus for pci in cpu.each("pci")]
    gpus = [(pci, gpu) for pci in pcis for gpu in pci.children if gpu.tag == "gpu"]
    if not gpus:
        return
    source = draft.source
    rates = [_gpu_bytes_per_s(pci, gpu, source) for pci, gpu in gpus]
    rate = min((rate for rate in rates if rate), default=None)
    nets = [net for cpu in cpus for net in cpu.each("net") if net.attributes.get("keep") != "0"]
    labels = {"nics": ",".join(net.attributes.get("name", "") for net in nets)} if nets else {}
    host = Host(
        f"{source}:{gpus[0][1].line}",
        device=_DEVICE_BY_SM.get(_compute_capability(gpus[0][1], source)),
        count=len(gpus),
        labels=labels,
        inside=InsideLink(bandwidth_bytes_per_s=rate),
    )
    draft.add_host(name, host)
    for index, net in enumerate(nets):
        speed = _number(net, "speed", source) * 1e6 / 8
        rail = net.attributes.get("dev", str(index))
        _add_rail(draft, name, rail, speed or None, f"{source}:{net.line}")


def _add_rail(
    draft: Draft, host: str, number: str, bandwidth_bytes_per_s: float | None, where: str
) -> None:
    rail = f"rail{number}"
    if rail not in draft.switches:
        draft.add_switch(rail, where)
    draft.join(Cable(host, rail, where, bandwidth_bytes_per_s))


def _gpu_bytes_per_s(pci: Element, gpu: Element, source: str) -> float | None:
    """What a GPU sends to its peers: all its NVLinks together, else its PCIe lanes."""
    links = sum(_number(link, "count", source) for link in gpu.each("nvlink"))
    if links:
        capability = _compute_capability(gpu, source)
        older = [known for known in _NVLINK_BYTES_PER_S if known <= capability]
        return links * _NVLINK_BYTES_PER_S[max(older, default=60)]
    speed = re.match(r"\d{1,3}(\.\d)?", pci.attributes.get("link_speed", ""))
    lane = _LANE_BYTES_PER_S.get(float(speed[0])) if speed else None
    width = _number(pci, "link_width", source)
    return lane * width if lane and width else None


def _compute_capability(gpu: Element, source: str) -> int:
    return int(_number(gpu, "sm", source))


def _number(element: Element, key: str, source: str) -> float:
    """A number of an element; 0 where it is missing or empty."""
    given = element.attributes.get(key, "").strip() or "0"
    if not re.fullmatch(r"\d{1,12}(\.\d{1,12})?", given):
        raise BadInput(
            f"{key} of <{element.tag}> is {shown(given)}",
            where=f"{source}:{element.line}",
            fix="give a number",
        )
    return float(given)


def _devices(channel: Element, tag: str) -> list[str]:
    return [child.attributes.get("dev", "0") for child in channel.children if child.tag == tag]


def _node_name(source: str, index: int, count: int) -> str:
    """The file's name: a dump does not say the host's."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(source).name.split(".")[0]).strip("-._") or "node"
    return stem if count == 1 else f"{stem}-{index}"
