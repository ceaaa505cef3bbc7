"""Clusters: what a file may say, and the widest paths through the network."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.cluster import Cluster, Node
from trimtab.core.errors import BadInput
from trimtab.core.node_names import NODE_NAME_RULE, is_node_name
from trimtab.core.plan import Slot
from trimtab.core.units import parse_bytes, parse_bytes_per_s, parse_flop_per_s, parse_seconds

EXAMPLES = Path(__file__).parents[2] / "examples" / "clusters"
NODES = "nodes:\n- {name: n0, device: H100}\n- {name: n1, device: A40, count: 4}\n"
LINK = "links:\n- {a: n0, b: n1, bandwidth_bytes_per_s: 100 Gb/s, latency_s: 5us}\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (NODES + "speed: 3\n", ":4: speed is an unknown key; known are links, name, nodes, "
         "own_devices, switches."),
        (NODES.replace("count", "counts"), ":3: nodes[1].counts is an unknown key; "
         "the nearest known one is 'count'."),
        (NODES + LINK.replace("100 Gb/s", "-1"), ":5: links[0].bandwidth_bytes_per_s is -1; "
         "it should be greater than 0."),
        (NODES + LINK.replace("100 Gb/s", "-1 GB/s"), ":5: links[0].bandwidth_bytes_per_s is "
         "-1000000000.0; it should be greater than 0."),
        (NODES + LINK.replace("100 Gb/s", ".inf"), ":5: links[0].bandwidth_bytes_per_s is inf; "
         "it should be a finite number."),
        (NODES + LINK.replace("100 Gb/s", "100 Gbit"), ":5: links[0].bandwidth_bytes_per_s: "
         "'100 Gbit' is no quantity; write 100 Gb/s (bits), 25 GB/s (bytes) or bytes per second."),
        (NODES + LINK.replace("100 Gb/s", "100e12"), ":5: links[0].bandwidth_bytes_per_s: 1e+14 "
         "bytes per second are more than any link carries; give at most 10 TB/s, and write Gb/s "
         "for bits."),
        (NODES + LINK.replace("100 Gb/s", "1e-300"), ":5: links[0].bandwidth_bytes_per_s: 1e-300 "
         "bytes per second are less than any link carries; give at least 1 B/s, or leave the link "
         "out."),
        (NODES + LINK.replace("5us", "-5us"), ":5: links[0].latency_s is -4.9999999999999996e-06; "
         "it should be greater than or equal to 0."),
        (NODES + LINK.replace("5us", "5 lightyears"), ":5: links[0].latency_s: '5 lightyears' is "
         "no quantity; write 5 us, 2 ms or seconds."),
        (NODES + "- {name: n0, device: L4}\n", ":4: nodes[2].name: the name 'n0' is given twice; "
         "give each node and switch a name of its own."),
        (NODES + "- {name: gpu/0, device: L4}\n", ":4: nodes[2].name: 'gpu/0' is no host's name; "
         f"{NODE_NAME_RULE}."),
        (NODES + "switches: [s, n1]\n", ":4: switches[1]: the name 'n1' is given twice; "
         "give each node and switch a name of its own."),
        (NODES + LINK.replace("b: n1", "b: n9"), ":5: links[0].b: 'n9' is no node or switch; "
         "known are n0, n1."),
        (NODES + LINK.replace("b: n1", "b: n0"), ":5: links[0].b: it joins 'n0' with itself; "
         "give two different ends; `inside` of a node joins its devices."),
        (NODES + LINK + "- {a: n1, b: n0, bandwidth_bytes_per_s: 1}\n", ":6: links[1]: it joins "
         "'n1' and 'n0' again; give one link with the bandwidths summed."),
        (NODES.replace("H100", "H101"), ":2: nodes[0].device: there is no device 'H101'; "
         "the nearest known one is 'H100'."),
        (NODES.replace("count: 4", "count: 0"), ":3: nodes[1].count is 0; it should be greater "
         "than 0."),
        (NODES.replace("count: 4", "usd_per_hour: .nan"), ":3: nodes[1].usd_per_hour is nan; "
         "it should be a finite number."),
        ("nodes: []\n", ":1: nodes is a list of length 0; it should have at least 1 item, not "
         "0."),
    ],
)  # fmt: skip
def test_a_fault_in_a_cluster_file_is_one_sentence_with_its_line(tmp_path, text, expected):
    path = written(tmp_path, text)
    with pytest.raises(BadInput) as caught:
        Cluster.read(path)
    assert str(caught.value) == f"{path}{expected}"


def test_a_node_out_of_reach_is_refused_where_it_matters(tmp_path):
    path = written(tmp_path, NODES)
    assert Cluster.read(path).unreachable == ("n1",)
    with pytest.raises(BadInput) as caught:
        Cluster.read(path, connected=True)
    assert str(caught.value) == (
        f"{path}:3: no links lead from 'n0' to 'n1'; "
        "add links so that every node reaches every other."
    )
    with pytest.raises(BadInput, match="no links lead from 'n0' to 'n1' in cluster; add a link"):
        Cluster.read(path).bandwidth_bytes_per_s("n0", "n1")
    with pytest.raises(BadInput, match="there is no node 'n7' in cluster; known are n0, n1"):
        Cluster.read(path).latency_s("n0", "n7")


def test_a_cluster_knows_its_devices_their_rent_and_its_links(tmp_path):
    text = NODES + "- {name: n2, device: A40, usd_per_hour: 9, memory_bytes: 40 GiB}\n" + LINK
    cluster = Cluster.read(written(tmp_path, text))
    assert [d.name for d in cluster.devices()] == ["n0/0", "n1/0", "n1/1", "n1/2", "n1/3", "n2/0"]
    assert cluster.devices()[-1].profile.memory_bytes == 40 * 2**30
    assert cluster.usd_per_hour == pytest.approx(2.99 + 4 * 0.55 + 9)
    assert cluster.bandwidth_bytes_per_s("n0", "n1") == 12.5e9
    assert cluster.latency_s("n1", "n0") == pytest.approx(5e-6)
    assert cluster.bandwidth_bytes_per_s("n0", "n0") == 450e9
    assert cluster.graph.nodes["n0"] == {"kind": "node"}


def test_own_device_profiles_may_be_in_the_cluster_file_or_beside_it(tmp_path):
    profile = (
        "{name: H100, vendor: me, memory_bytes: 1 GB, memory_bandwidth_bytes_per_s: 1 GB/s, "
        "peak_flop_per_s: {fp16: 1 TFLOPS}, link: rope, link_bandwidth_bytes_per_s: 1 GB/s, "
        "tdp_w: 1, usd_per_hour: 1}"
    )
    inside = Cluster.read(written(tmp_path, NODES + f"own_devices: [{profile}]\n"))
    beside = tmp_path / "devices.yaml"
    beside.write_text(f"devices: [{profile}]\n")
    outside = Cluster.read(written(tmp_path, NODES), own_devices=beside)
    assert inside == outside
    assert inside.profile("n0").vendor == "me"
    assert inside.profile("n1").vendor == "NVIDIA"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_connected_and_survive_json(path):
    cluster = Cluster.read(path, connected=True)
    assert Cluster.model_validate_json(cluster.model_dump_json()) == cluster


def test_the_examples_are_what_they_say():
    mix = Cluster.read(EXAMPLES / "rented-mix.yaml")
    assert len(mix.devices()) == 62  # the first availability snapshot of arXiv:2502.00722
    assert mix.bandwidth_bytes_per_s("h100-0", "a40-1") == 5e9 / 8
    tiers = Cluster.read(EXAMPLES / "two-tier.yaml")
    assert tiers.latency_s("n0", "n1") == pytest.approx(2e-6)
    assert tiers.latency_s("n0", "n7") == pytest.approx(4e-6)


@st.composite
def networks(draw) -> Cluster:
    size = draw(st.integers(2, 6))
    names = [f"n{i}" for i in range(size)]
    ends = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    links = [
        {
            "a": a,
            "b": b,
            "bandwidth_bytes_per_s": draw(st.integers(1, 5)),
            "latency_s": draw(st.integers(0, 5)),
        }
        for a, b in draw(st.lists(st.sampled_from(ends), unique=True))
    ]
    nodes = [{"name": name, "device": "T4"} for name in names]
    return Cluster.model_validate({"nodes": nodes, "links": links})


@given(networks())
def test_the_widest_path_is_that_of_brute_force(cluster: Cluster):
    for b in [node.name for node in cluster.nodes[1:]]:
        best: list[tuple[float, float]] = []
        for path in nx.all_simple_paths(cluster.graph, "n0", b):
            hops = [cluster.graph.edges[hop] for hop in pairwise(path)]
            width = min(hop["bandwidth_bytes_per_s"] for hop in hops)
            best.append((-width, sum(hop["latency_s"] for hop in hops)))
        if not best:
            assert b in cluster.unreachable
            continue
        width, latency_s = min(best)
        assert cluster.bandwidth_bytes_per_s("n0", b) == -width
        assert cluster.bandwidth_bytes_per_s(b, "n0") == -width
        assert cluster.latency_s("n0", b) == pytest.approx(latency_s)


def test_a_hostfile_becomes_hosts_on_one_switch(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# two hosts\nworker-1 slots=4\n\nworker-2 slots=2  # half\n")
    cluster = Cluster.from_hostfile(path, device="A100", bandwidth_bytes_per_s=25e9)
    assert [(node.name, node.count) for node in cluster.nodes] == [("worker-1", 4), ("worker-2", 2)]
    assert cluster.bandwidth_bytes_per_s("worker-1", "worker-2") == 25e9
    assert cluster.latency_s("worker-1", "worker-2") == pytest.approx(50e-6)
    assert Cluster.from_hostfile(path).profile("worker-1").name == "cpu"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a slots=1\na slots=2\n", ":2: the host 'a' is given twice; sum its slots on one line."),
        ("a slots=none\n", ":1: slots is 'none'; give a number from 1."),
        ("a slots=0\n", ":1: slots is '0'; give a number from 1."),
        (f"a slots={'7' * 5000}\n", f":1: slots is '{'7' * 59}…; give a number from 1."),
        ("a slots=1\nb/0 slots=1\n", f":2: 'b/0' is no host's name; {NODE_NAME_RULE}."),
        ("a b c\n", ":1: 'a b c' is no host; write HOST slots=COUNT."),
        ("# nothing\n", ": there is no host; add HOST slots=COUNT."),
    ],
)
def test_a_fault_in_a_hostfile_is_placed(tmp_path, text, expected):
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        Cluster.from_hostfile(path)
    assert str(caught.value) == f"{path}{expected}"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("n1", True),
        ("gpu-node_3.example.com", True),
        ("0", True),
        ("n" * 253, True),
        ("n" * 254, False),
        ("", False),
        ("gpu/0", False),
        ("nöde", False),
        ("a b", False),
        ("a\n", False),
        ("٣", False),
        ("-n", False),
        ("user@host", False),
        ("n[1-2]", False),
        ("fe80::1", False),
    ],
)
def test_clusters_and_plans_take_the_same_names(name, allowed):
    assert is_node_name(name) == allowed
    for made in (lambda: Node(name=name, device="cpu"), lambda: Slot(node=name, device=0)):
        with nullcontext() if allowed else pytest.raises(ValueError, match="1 validation error"):
            made()


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_bytes_per_s, "100Gb/s", 12.5e9),
        (parse_bytes_per_s, "100 Gbps", 12.5e9),
        (parse_bytes_per_s, "25 GB/s", 25e9),
        (parse_bytes_per_s, "25 GBps", 25e9),
        (parse_bytes_per_s, "1.5 GiB/s", 1.5 * 2**30),
        (parse_bytes_per_s, "8e3 b/s", 1000.0),
        (parse_bytes, "80 GiB", 80 * 2.0**30),
        (parse_bytes, "24GB", 24e9),
        (parse_bytes, "12 B", 12.0),
        (parse_seconds, "5us", 5e-6),
        (parse_seconds, "5 µs", 5e-6),
        (parse_seconds, "2 ms", 2e-3),
        (parse_seconds, "1.5s", 1.5),
        (parse_seconds, "2 min", 120.0),
        (parse_flop_per_s, "989 TFLOPS", 989e12),
        (parse_flop_per_s, "660.6 TOPS", 660.6e12),
        (parse_bytes, 17, 17),
        (parse_bytes, "1e9", "1e9"),
    ],
)
def test_quantities_are_read_as_people_write_them(parse, text, value):
    assert parse(text) == (value if isinstance(value, str) else pytest.approx(value))
