"""Which nodes are close: against a slow twin, with further cables, in trees of uneven depth."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.cluster import Cluster
from trimtab.core.topology import read_topology
from trimtab.placement.fabric import Fabric, domains
from trimtab.placement.job import TrainingJob
from trimtab.placement.planner import plan_placement

Cable = tuple[str, str]
Domains = set[frozenset[str]]


def network(cables: Iterable[Cable]) -> Cluster:
    """A cluster of cables; whose name begins with n is a node."""
    cables = list(cables)
    names = sorted({end for cable in cables for end in cable})
    return Cluster.model_validate(
        {
            "nodes": [
                {"name": n, "device": "cpu", "count": 8, "labels": {}}
                for n in names
                if n.startswith("n")
            ],
            "switches": [n for n in names if not n.startswith("n")],
            "links": [{"a": a, "b": b, "bandwidth_bytes_per_s": 1e9} for a, b in cables],
        }
    )


def tiers(cables: Iterable[Cable] | Cluster) -> list[Domains]:
    """The domains of each tier, the widest first."""
    cluster = cables if isinstance(cables, Cluster) else network(cables)
    fabric = Fabric.of(cluster)
    return [
        {frozenset(p.name for p in places) for places in domains(fabric.places, tier).values()}
        for tier in range(len(fabric.tiers))
    ]


def sizes(cables: Iterable[Cable] | Cluster) -> list[list[int]]:
    return [sorted(map(len, tier)) for tier in tiers(cables)]


def hang(upper: str, *lower: str) -> list[Cable]:
    return [(name, upper) for name in lower]


def rack(name: str, count: int) -> list[Cable]:
    return hang(name, *(f"n-{name}-{i}" for i in range(count)))


def even(pods: int = 3, leaves: int = 2, nodes: int = 4) -> list[Cable]:
    cables = hang("core", *(f"spine{p}" for p in range(pods)))
    for pod, leaf in itertools.product(range(pods), range(leaves)):
        cables += [(f"leaf{pod}{leaf}", f"spine{pod}"), *rack(f"leaf{pod}{leaf}", nodes)]
    return cables


UNEVEN = [
    *hang("core", "spine", "rack1", "rack2"),
    *hang("spine", "leaf0", "leaf1"),
    *(cable for name in ("leaf0", "leaf1", "rack1", "rack2") for cable in rack(name, 4)),
]


# ---- a slow twin


def slow_tiers(cables: Sequence[Cable]) -> list[Domains]:
    """By walking all ways up from each switch, and deleting switches one rank after another."""
    nodes = {end for cable in cables for end in cable if end.startswith("n")}
    up: nx.DiGraph[str] = nx.DiGraph(cables)
    core = [switch for switch in up if up.out_degree(switch) == 0]

    def rank(switch: str) -> int:
        ways = (way for top in core for way in nx.all_simple_paths(up, switch, top))
        return max((len(way) - 1 for way in ways), default=0)

    ranks = {switch: rank(switch) for switch in up if switch not in nodes}
    found: list[Domains] = [{frozenset(nodes)}]
    for taken in range(1, max(ranks.values()) + 2):
        left = {switch for switch in ranks if ranks[switch] >= taken}
        graph: nx.Graph[str] = nx.Graph()
        graph.add_nodes_from(nodes | left)
        graph.add_edges_from((a, b) for a, b in cables if a in nodes | left and b in left)
        for a, b in itertools.combinations(sorted(nodes), 2):
            lowest = [max(up[n], key=lambda switch: ranks[switch]) for n in (a, b)]
            if ranks[lowest[0]] == ranks[lowest[1]] < taken:
                shared = set(up[a]) & set(up[b])
                if any(ranks[s] == ranks[lowest[0]] for s in shared):
                    graph.add_edge(a, b)
        parts = nx.connected_components(graph)
        domain = {frozenset(part & nodes) for part in parts if part & nodes}
        if domain != found[-1] and len(domain) < len(nodes):
            found.append(domain)
    found = found[1:]
    while len(found) > 1 and several(found[0]) < 2 <= several(found[1]):
        found = found[1:]
    return found


def several(tier: Domains) -> int:
    return sum(len(domain) > 1 for domain in tier)


@st.composite
def trees(draw: st.DrawFn, most_racks: int = 3) -> list[Cable]:
    """What hangs below the core: nodes, racks, spines of leaves with nodes of their own, zones."""
    cables: list[Cable] = []
    for child in range(draw(st.integers(2, 4))):
        kind = draw(st.sampled_from(["node", "rack", "rack", "pod", "pod", "zone"]))
        cables += below_core(draw, kind, f"{child}", most_racks)
    # The core and two racks at least, so that there is something to tell apart.
    return [*cables, ("rackx", "core"), *rack("rackx", 2), ("racky", "core"), *rack("racky", 2)]


def below_core(draw: st.DrawFn, kind: str, name: str, most: int) -> list[Cable]:
    if kind == "node":
        return [(f"n-{name}", "core")]
    if kind == "rack":
        return [(f"rack{name}", "core"), *rack(f"rack{name}", draw(st.integers(1, 3)))]
    if kind == "pod":
        return [(f"pod{name}", "core"), *pod(draw, f"pod{name}", most)]
    pods = range(draw(st.integers(1, 2)))
    cables = [(f"zone{name}", "core")]
    for number in pods:
        cables += [(f"pod{name}-{number}", f"zone{name}"), *pod(draw, f"pod{name}-{number}", most)]
    return cables


def pod(draw: st.DrawFn, name: str, most: int) -> list[Cable]:
    cables = rack(name, draw(st.sampled_from([0, 0, 1, 2])))
    for leaf in range(draw(st.integers(1, most))):
        cables += [(f"leaf-{name}-{leaf}", name), *rack(f"leaf-{name}-{leaf}", 2)]
    return cables


def shortcuts(cables: Sequence[Cable]) -> list[Cable]:
    """Further cables that lead on up: each from a point to one that is above it, but not next."""
    up: nx.DiGraph[str] = nx.DiGraph(cables)
    return [(a, b) for a in sorted(up) for b in sorted(nx.descendants(up, a)) if b not in up[a]]


def to_core(cable: Cable) -> bool:
    """Whether it leads from a node or a leaf to the core."""
    return cable[0].startswith(("n", "leaf")) and cable[1] == "core"


@given(trees(), st.data())
def test_tiers_are_those_of_the_slow_twin(cables: list[Cable], data: st.DataObject) -> None:
    may = [c for c in shortcuts(cables) if c[0].startswith("n") or to_core(c)]
    more = data.draw(st.lists(st.sampled_from(may), max_size=3, unique=True)) if may else []
    extended = [*cables, *more]
    found = tiers(extended)
    if not any(equal(extended, cable) for cable in extended):
        assert found == slow_tiers(extended)
    assert found[0] == slow_tiers(extended)[0]


def equal(cables: Collection[Cable], cable: Cable) -> bool:
    """Whether some switch is above both ends, which may then count as equals."""
    up: nx.DiGraph[str] = nx.DiGraph(list(cables))
    return not cable[0].startswith("n") and bool(set(up[cable[0]]) & set(up[cable[1]]))


@given(trees())
def test_what_hangs_below_the_core_is_a_domain(cables: list[Cable]) -> None:
    graph = nx.Graph(cables)
    direct = frozenset(n for n in graph["core"] if n.startswith("n"))
    graph.remove_node("core")
    graph.remove_nodes_from(direct)
    parts = {frozenset(n for n in part if n[0] == "n") for part in nx.connected_components(graph)}
    assert tiers(cables)[0] == parts | ({direct} if direct else set())


@given(trees(), st.randoms(use_true_random=False))
def test_relabelling_and_shuffling_change_nothing(cables: list[Cable], draw: random.Random) -> None:
    names = sorted({end for cable in cables for end in cable})
    nodes = [name for name in names if name.startswith("n")]
    switches = [name for name in names if not name.startswith("n")]
    new = dict(zip(nodes, draw.sample(nodes, len(nodes)), strict=True))
    new |= dict(zip(switches, draw.sample(switches, len(switches)), strict=True))
    other = [(new[a], new[b]) for a, b in draw.sample(cables, len(cables))]
    expected = [{frozenset(new[n] for n in part) for part in tier} for tier in tiers(cables)]
    assert tiers(other) == expected


@given(trees(), st.data())
def test_a_further_cable_only_joins_domains(cables: list[Cable], data: st.DataObject) -> None:
    """From a node or a leaf to the core, or between two leaves of a pod."""
    core = [cable for cable in shortcuts(cables) if to_core(cable)]
    leaves = [
        (a, b)
        for (a, over), (b, other) in itertools.permutations(cables, 2)
        if over == other and a.startswith("leaf") and b.startswith("leaf")
    ]
    may = core + leaves
    if not may:
        return
    before, after = tiers(cables)[0], tiers([*cables, data.draw(st.sampled_from(may))])[0]
    assert all(any(old <= new for new in after) for old in before)


def test_a_crowded_core_is_no_mesh_with_what_is_below() -> None:
    """Nodes and a leaf have cables of their own to the core, beside those to a spine with nodes."""
    cables = [*hang("core", "pod", "rack1", "rack2"), *rack("pod", 2), ("leaf", "pod")]
    cables += [*rack("leaf", 2), *rack("rack1", 2), *rack("rack2", 2), *rack("core", 2)]
    further = [("leaf", "core"), ("n-leaf-0", "core"), ("n-leaf-1", "core")]
    assert sizes(cables)[0] == [2, 2, 2, 4]
    assert sizes([*cables, *further])[0] == [2, 2, 2, 4]


@settings(max_examples=12, deadline=None)
@given(trees(most_racks=2), st.data())
def test_a_further_cable_never_makes_the_optimum_worse(
    cables: list[Cable], data: st.DataObject
) -> None:
    may = [cable for cable in shortcuts(cables) if to_core(cable)]
    if not may:
        return
    more = data.draw(st.lists(st.sampled_from(may), min_size=1, max_size=1, unique=True))
    alpha = data.draw(st.sampled_from([0.2, 0.5, 0.9]))
    best = [brute_force(each, 2, 3, alpha) for each in (cables, [*cables, *more])]
    assert best[1] <= best[0] + 1e-9
    for each, value in zip((cables, [*cables, *more]), best, strict=True):
        assert planned(network(each), 2, 3, alpha) == pytest.approx(value)


def brute_force(cables: Sequence[Cable], rows: int, columns: int, alpha: float) -> float:
    """The least weighted spread of all placements over the domains below the core."""
    room = sorted(map(len, slow_tiers(cables)[0]), reverse=True)
    best = float("inf")
    for cells in itertools.product(range(len(room)), repeat=rows * columns):
        # Domains are taken up in order, but for what their rooms tell apart.
        if all(cells.count(domain) <= room[domain] for domain in set(cells)):
            across = max(len(set(cells[r * columns : (r + 1) * columns])) for r in range(rows))
            down = max(len(set(cells[c::columns])) for c in range(columns))
            best = min(best, alpha * down + (1 - alpha) * across)
    return best


def planned(cluster: Cluster, rows: int, columns: int, alpha: float) -> float:
    job = TrainingJob(tensor_parallel=8, data_parallel=rows, pipeline_parallel=columns)
    plan = plan_placement(cluster, job, alpha=alpha)
    assert plan.objective is not None
    return plan.objective.value


# ---- networks that people have


def test_nodes_on_the_core_do_not_hide_the_pods() -> None:
    assert sizes([*even(), ("n-login", "core")]) == [[1, 8, 8, 8], [1] + [4] * 6]
    assert sizes([*even(), ("n-login", "core"), ("n-more", "core")])[0] == [2, 8, 8, 8]
    monitored = [*even(), ("n-a", "core"), ("n-b", "spine0"), ("n-c", "spine1")]
    assert sizes(monitored)[0] == [1, 8, 9, 9]
    fabric = Fabric.of(network([*even(), ("n-login", "core")]))
    assert fabric.tiers == ("pod", "leaf")
    assert {p.path for p in fabric.places if p.name == "n-login"} == {("n-login", "n-login")}


def test_a_switch_above_the_core_with_a_lone_node_is_no_tier() -> None:
    assert sizes([*even(), ("core", "root"), ("n-login", "root")])[0] == [1, 8, 8, 8]


@pytest.mark.parametrize("leaf", [2, 4, 8])
def test_racks_below_the_core_are_pods(leaf: int) -> None:
    """Also where leaves and racks are of one size: only what the file says is above tells then."""
    cables = [c for c in UNEVEN if not c[0].startswith("n")]
    cables += [*rack("leaf0", leaf), *rack("leaf1", leaf), *rack("rack1", 8), *rack("rack2", 8)]
    fabric = Fabric.of(network(cables))
    assert fabric.tiers == ("pod", "leaf")
    assert {p.path[0] for p in fabric.places} == {"spine", "rack1", "rack2"}
    assert {p.path[1] for p in fabric.places} == {"leaf0", "leaf1", "rack1", "rack2"}


def test_a_zone_may_be_deeper_than_others() -> None:
    cables = [*even(2), ("core", "top"), *hang("top", "zone", "rack")]
    cables += [*hang("zone", "leafa", "leafb"), *rack("leafa", 3), *rack("leafb", 3)]
    cables += rack("rack", 5)
    assert Fabric.of(network(cables)).tiers == ("zone", "pod", "leaf")
    assert sizes(cables) == [[5, 6, 16], [3, 3, 5, 8, 8], [3, 3, 4, 4, 4, 4, 5]]


@pytest.mark.parametrize(
    "cable",
    [("n-leaf00-0", "core"), ("leaf00", "core"), ("leaf00", "leaf01"), ("n-leaf00-0", "spine0")],
)
def test_a_further_cable_takes_nothing_apart(cable: Cable) -> None:
    for cables in (even(), [*even(), ("n-login", "core")]):
        assert tiers([*cables, cable]) == tiers(cables)
        assert tiers([*cables, (cable[1], cable[0])]) == tiers(cables)


def clos_cables(pods: int, leaves: int, nodes: int, rails: int, cores: int) -> list[Cable]:
    """Rails of a pod as leaves, a spine of each pod for each core."""
    cables: list[Cable] = []
    for p in range(pods):
        for s in range(cores):
            cables.append((f"spine{p}-{s}", f"core{s}"))
            cables += [
                (f"leaf{p}-{f}-{r}", f"spine{p}-{s}") for f in range(leaves) for r in range(rails)
            ]
        for leaf, node, rail in itertools.product(range(leaves), range(nodes), range(rails)):
            cables.append((f"n{p}-{leaf}-{node}", f"leaf{p}-{leaf}-{rail}"))
    return cables


def test_rails_and_several_spines_are_one_pod() -> None:
    whole = clos_cables(3, 2, 4, 2, 3)
    assert sizes(whole) == [[8] * 3, [4] * 6]
    broken = [c for c in whole if c != ("spine2-0", "core0")]
    assert sizes(broken) == sizes(whole)
    for peers in (("core0", "core1"), ("core1", "core0")):
        for more in ([], [("n-login", "core0")]):
            assert sizes([*whole, *more, peers])[0] == [1] * len(more) + [8] * 3


def test_leaves_below_several_spines() -> None:
    cables = [(f"leaf{leaf}", f"spine{s}") for leaf in range(4) for s in range(3)]
    cables += [cable for leaf in range(4) for cable in rack(f"leaf{leaf}", 3)]
    assert sizes(cables) == [[3] * 4]
    assert sizes([*cables, ("n-store", "spine1")]) == [[1, 3, 3, 3, 3]]


@pytest.mark.parametrize("cables", [even(), clos_cables(3, 2, 4, 2, 3), even(4, 3, 2)])
def test_ends_may_be_given_in_any_order_where_depth_is_even(cables: list[Cable]) -> None:
    assert tiers([(b, a) for a, b in cables]) == tiers(cables)
    core = next(b for _, b in cables if b.startswith("core"))
    for more in ([], [("n-login", core)]):
        turned = [(b, a) if b.startswith("core") else (a, b) for a, b in [*cables, *more]]
        assert tiers(turned) == tiers([*cables, *more])


def test_a_mesh_stands_for_a_core() -> None:
    groups = [c for c in even() if c[1] != "core"]
    mesh = list(itertools.combinations(["spine0", "spine1", "spine2"], 2))
    assert sizes([*groups, *mesh]) == [[8] * 3, [4] * 6]
    leaves = [cable for leaf in range(4) for cable in rack(f"leaf{leaf}", 3)]
    for order in itertools.permutations(range(4), 2):
        leaves += [(f"leaf{a}", f"leaf{b}") for a, b in [order] if a < b]
    assert sizes(leaves) == [[3] * 4]


def test_all_nodes_on_one_switch_or_one_cable_have_no_tiers() -> None:
    assert tiers(rack("switch", 5)) == []
    assert tiers([("n0", "n1"), ("n1", "n2")]) == []
    assert tiers([(f"n{i}", f"rail{r}") for i in range(4) for r in range(8)]) == []


def test_unused_switches_change_nothing() -> None:
    assert tiers([*UNEVEN, ("empty", "spine"), ("bare", "empty")]) == tiers(UNEVEN)


def test_files_of_uneven_depth(tmp_path: Path) -> None:
    path = tmp_path / "topology.conf"
    path.write_text(
        "SwitchName=leaf0 Nodes=n[0-3]\nSwitchName=leaf1 Nodes=n[4-7]\n"
        "SwitchName=spine0 Switches=leaf[0-1]\nSwitchName=rack1 Nodes=n[8-15]\n"
        "SwitchName=rack2 Nodes=n[16-23]\nSwitchName=core Switches=spine0,rack[1-2] Nodes=login\n"
    )
    assert sizes(read_topology(path)) == [[1, 8, 8, 8], [1, 4, 4, 8, 8]]


def test_ibnetdiscover_with_hosts_on_high_switches(tmp_path: Path) -> None:
    """Nothing in the file says what is above: a login node on a core hides no pod."""
    cables = [*clos_cables(3, 2, 6, 1, 2), ("nlogin", "core0"), ("nstore", "spine1-1")]
    cables = [c for c in cables if c[0] not in {f"n2-1-{i}" for i in range(1, 6)}]
    path = tmp_path / "ib.txt"
    path.write_text(discovered(cables))
    assert sizes(read_topology(path)) == [[1, 7, 12, 13], [1, 1, 1, 6, 6, 6, 6, 6]]


def discovered(cables: Sequence[Cable]) -> str:
    ports: dict[str, list[tuple[int, str, int]]] = {}
    for a, b in cables:
        one, other = (len(ports.setdefault(end, [])) + 1 for end in (a, b))
        ports[a].append((one, b, other))
        ports[b].append((other, a, one))
    lines = []
    for name, joined in ports.items():
        kind, mark = ("Ca", "H-") if name.startswith("n") else ("Switch", "S-")
        text = f"{name} mlx5_0" if kind == "Ca" else f"MF0;{name}:MQM9700/U1"
        lines.append(f'{kind} 64 "{mark}{name}" # "{text}"')
        for port, other, number in joined:
            far = ("H-" if other.startswith("n") else "S-") + other
            lines.append(f'[{port}] "{far}"[{number}] # "x" lid 5 4xNDR')
    return "\n".join(lines) + "\n"


def test_the_plan_of_uneven_racks_is_not_laid_across_the_core() -> None:
    cables = [c for c in UNEVEN if not c[0].startswith("n")]
    cables += [*rack("leaf0", 4), *rack("leaf1", 4), *rack("rack1", 8), *rack("rack2", 8)]
    assert planned(network(cables), 16, 1, 0.9) == pytest.approx(0.9 * 2 + 0.1)
    further = [*even(), ("n-leaf00-0", "core")]
    assert planned(network(further), 8, 2, 0.3) <= planned(network(even()), 8, 2, 0.3)


def test_a_cluster_without_a_network_is_told_so() -> None:
    job = TrainingJob(tensor_parallel=8, data_parallel=2)
    plan = plan_placement(network(rack("switch", 4)), job, alpha=0.3)
    assert any("no network that tells" in warning for warning in plan.warnings)
    other = plan_placement(network(even()), job, alpha=0.3)
    assert not any("no network that tells" in warning for warning in other.warnings)
