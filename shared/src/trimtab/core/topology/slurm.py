"""Slurm's topology.conf, and the topology.yaml of Slurm 25.05 and later; Topograph writes both.

A LinkSpeed has no unit in Slurm: here the slowest among the switches that have nodes stands for the
assumed bandwidth of a node's link.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from trimtab.core.documents import LineMap, nearest, place, shown
from trimtab.core.errors import BadInput, Unsupported
from trimtab.core.topology.assumptions import Assumed
from trimtab.core.topology.draft import Cable, Draft, Host
from trimtab.core.topology.hostlist import expand

_KEYS = {
    "switchname": "SwitchName",
    "nodes": "Nodes",
    "switches": "Switches",
    "linkspeed": "LinkSpeed",
    "blockname": "BlockName",
    "blocksizes": "BlockSizes",
}
_PAIR = re.compile(r"(\w+)\s*=\s*(\"[^\"]*\"|\S*)")


@dataclass(frozen=True, slots=True)
class _Said:
    """What a file says of one switch or block, with the place of it."""

    name: str
    nodes: str
    switches: str
    speed: float | None
    where: str


def draft_of_conf(text: str, source: str, assumed: Assumed) -> Draft:
    """The network of a topology.conf, for topology/tree or topology/block.

    Raises:
        BadInput: it names the line, and what would be right.
    """
    switches: list[_Said] = []
    blocks: list[_Said] = []
    sizes: list[int] = []
    for number, line in _logical_lines(text):
        where = f"{source}:{number}"
        said = _pairs(line, where)
        if "SwitchName" in said:
            switches.append(_switch(said, where))
        elif "BlockName" in said:
            blocks.append(_Said(said["BlockName"], said.get("Nodes", ""), "", None, where))
        elif "BlockSizes" in said:
            sizes = _sizes(said["BlockSizes"].split(","), where)
        else:
            raise BadInput(
                "the line describes no switch or block",
                where=where,
                fix="begin it with SwitchName= or BlockName=",
            )
    if switches and blocks:
        raise BadInput("there are switches and blocks", where=blocks[0].where, fix="give one kind")
    return _of_blocks(blocks, sizes, source) if blocks else _of_switches(switches, source, assumed)


def draft_of_yaml(data: Any, lines: LineMap, source: str, assumed: Assumed) -> Draft:
    """The network of a topology.yaml: of its default topology, else of its first.

    Raises:
        BadInput: it names the line, and what would be right.
        Unsupported: the topology is of another kind than tree, block and flat.
    """
    topologies = [_mapping(entry, (i,), lines, source) for i, entry in enumerate(data)]
    index = next((i for i, t in enumerate(topologies) if t.get("cluster_default") is True), 0)
    topology, where = topologies[index], place(source, (index,), lines)
    if "tree" in topology:
        path = (index, "tree", "switches")
        return _of_switches(
            list(_listed(topology["tree"], "switch", path, lines, source)), source, assumed
        )
    if "block" in topology:
        path = (index, "block", "blocks")
        sizes = topology["block"].get("block_sizes") if isinstance(topology["block"], dict) else []
        listed = sizes if isinstance(sizes, list) else [sizes]
        blocks = list(_listed(topology["block"], "block", path, lines, source))
        return _of_blocks(blocks, _sizes(listed, place(source, path[:2], lines)), source)
    kinds = ", ".join(map(str, set(topology) - {"topology", "cluster_default"})) or "none"
    raise Unsupported(
        f"the topology {shown(topology.get('topology', ''))} has no tree or block (it has {kinds})",
        where=where,
        fix="give a tree or block topology, or a hostfile if all nodes hang on one switch",
    )


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines without comments; one that ends with a backslash goes on in the next."""
    begun, so_far = 0, ""
    for number, line in enumerate(text.split("\n"), 1):
        content = line.split("#", 1)[0].rstrip()
        begun = begun or number
        if content.endswith("\\"):
            so_far += content[:-1]
            continue
        if (so_far + content).strip():
            yield begun, so_far + content
        begun, so_far = 0, ""
    if so_far.strip():
        yield begun, so_far


def _pairs(line: str, where: str) -> dict[str, str]:
    said: dict[str, str] = {}
    end = 0
    for match in _PAIR.finditer(line):
        if line[end : match.start()].strip():
            break
        key = _KEYS.get(match[1].lower())
        if key is None:
            raise BadInput(
                f"{match[1]} is an unknown key", where=where, fix=nearest(match[1], _KEYS.values())
            )
        if key in said:
            raise BadInput(f"{key} is given twice", where=where, fix="give it once")
        said[key] = match[2].strip('"')
        end = match.end()
    if line[end:].strip():
        raise BadInput(
            f"{shown(line[end:].strip())} is no KEY=VALUE",
            where=where,
            fix="write SwitchName=s1 Nodes=n[1-4]",
        )
    return said


def _switch(said: Mapping[str, str], where: str) -> _Said:
    speed = said.get("LinkSpeed")
    if speed is not None and not (re.fullmatch(r"\d{1,15}(\.\d+)?", speed) and float(speed) > 0):
        raise BadInput(f"LinkSpeed is {shown(speed)}", where=where, fix="give a positive number")
    return _Said(
        said["SwitchName"],
        said.get("Nodes", ""),
        said.get("Switches", ""),
        float(speed) if speed is not None else None,
        where,
    )


def _sizes(values: Sequence[object], where: str) -> list[int]:
    sizes = []
    for value in values:
        given = str(value).strip()
        if not re.fullmatch(r"\d{1,10}", given, re.ASCII) or not 0 < int(given) <= 2**31:
            raise BadInput(
                f"a block size is {shown(value)}", where=where, fix="give a number of nodes"
            )
        sizes.append(int(given))
    return sizes


def _mapping(
    value: Any, path: tuple[str | int, ...], lines: LineMap, source: str
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadInput(
            f"{shown(value)} is no mapping", where=place(source, path, lines), fix="give keys"
        )
    return value


def _listed(
    topology: Any, kind: str, path: tuple[str | int, ...], lines: LineMap, source: str
) -> Iterator[_Said]:
    """The switches or blocks of a topology.yaml."""
    parent = _mapping(topology, path[:-1], lines, source)
    entries = parent.get(str(path[-1]))
    if not isinstance(entries, list):
        raise BadInput(
            f"{path[-1]} is {shown(entries)}",
            where=place(source, path, lines),
            fix=f"give a list of entries with {kind} and nodes",
        )
    for index, raw in enumerate(entries):
        entry = _mapping(raw, (*path, index), lines, source)
        where = place(source, (*path, index), lines)
        unknown = set(entry) - {kind, "nodes", "children"}
        if unknown:
            key = str(min(map(str, unknown)))
            raise BadInput(
                f"{key} is an unknown key",
                where=place(source, (*path, index, key), lines),
                fix=nearest(key, [kind, "nodes", "children"]),
            )
        if kind not in entry:
            raise BadInput(f"{kind} is missing", where=where, fix="add it")
        nodes, children = entry.get("nodes") or "", entry.get("children") or ""
        yield _Said(str(entry[kind]), str(nodes), str(children), None, where)


def _of_switches(switches: Sequence[_Said], source: str, assumed: Assumed) -> Draft:
    draft = Draft(source)
    rates = _rates(switches, assumed)
    for said in switches:
        draft.add_switch(_named(said), said.where)
    for said in switches:
        for name in expand(said.nodes, where=said.where) if said.nodes else []:
            _add_host(draft, name, said.where)
            draft.join(Cable(name, said.name, said.where, rates[said.name]))
        for name in expand(said.switches, where=said.where) if said.switches else []:
            if name not in draft.switches:
                raise BadInput(
                    f"the switch {name!r} below {said.name!r} is described nowhere",
                    where=said.where,
                    fix=nearest(name, draft.switches),
                )
            draft.join(Cable(name, said.name, said.where, rates[said.name]))
    return draft


def _rates(switches: Sequence[_Said], assumed: Assumed) -> dict[str, float | None]:
    """The bandwidth of the links below each switch that has a LinkSpeed."""
    speeds = [said.speed for said in switches if said.speed is not None and said.nodes]
    slowest = min(speeds, default=None)
    return {
        said.name: said.speed / slowest * assumed.bandwidth_bytes_per_s
        if said.speed is not None and slowest is not None
        else None
        for said in switches
    }


def _of_blocks(blocks: Sequence[_Said], sizes: Sequence[int], source: str) -> Draft:
    """Blocks as leaves; those that a larger block size takes together lie below one more switch."""
    draft = Draft(source)
    for said in blocks:
        draft.add_switch(_named(said), said.where)
        for name in expand(said.nodes, where=said.where) if said.nodes else []:
            _add_host(draft, name, said.where)
            draft.join(Cable(name, said.name, said.where))
    tops = [said.name for said in blocks]
    for smaller, larger in pairwise(sizes):
        if larger <= smaller or larger % smaller:
            raise BadInput(
                f"the block size {larger} follows {smaller}",
                where=source,
                fix="give a multiple of the one before it",
            )
        if len(tops) > 1:
            tops = _together(draft, tops, larger // smaller, larger)
    draft.join_roots()
    return draft


def _together(draft: Draft, names: Sequence[str], count: int, size: int) -> list[str]:
    waiting = iter(names)
    found: list[str] = []
    while part := list(islice(waiting, count)):
        name = f"block{size}-{len(found)}"
        draft.add_switch(name, draft.source)
        for lower in part:
            draft.join(Cable(lower, name, draft.source))
        found.append(name)
    return found


def _named(said: _Said) -> str:
    if not said.name or "=" in said.name:  # an empty value takes the next pair, as in Slurm
        raise BadInput("a switch or block has no name", where=said.where, fix="give it one")
    return said.name


def _add_host(draft: Draft, name: str, where: str) -> None:
    if name in draft.hosts:
        switch = draft.above[name][0].upper if name in draft.above else ""
        raise BadInput(
            f"the host {name!r} is below {switch!r} already, since {draft.hosts[name].where}",
            where=where,
            fix="put each host below one switch",
        )
    draft.add_host(name, Host(where))
