"""Topology readers: the cluster each format stands for, and the sentence each fault gets."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.cluster import Cluster
from trimtab.core.errors import BadInput, Unsupported
from trimtab.core.topology import Assumed, expand, fold, read_topology, reading, write_cluster
from trimtab.core.topology.kubernetes import SHRINK
from trimtab.core.topology.measured import Measurement, tiers_of

GB = 1e9
ASSUMED = Assumed("A40", 4, 10 * GB, 2e-6)

TREE_CONF = """
    # two leaves below one spine
    SwitchName=s0 Nodes=n[1-2] LinkSpeed=100   # InfiniBand
    switchname=s1 nodes=n[3,05] linkspeed=100
    SwitchName=spine Switches=s[0-1] \\
        LinkSpeed=200
"""


def read(folder: Path, text: str | bytes, name: str = "given", **changes: Any) -> Cluster:
    path = folder / name
    content = dedent(text).encode() if isinstance(text, str) else text
    path.write_bytes(content)
    return read_topology(path, ASSUMED)


def refused(folder: Path, text: str | bytes, kind: type[BadInput] = BadInput) -> str:
    with pytest.raises(kind) as error:
        read(folder, text)
    return str(error.value).replace(str(folder), "")


def links(cluster: Cluster) -> dict[tuple[str, str], float]:
    return {(link.a, link.b): link.bandwidth_bytes_per_s for link in cluster.links}


def above(cluster: Cluster) -> dict[str, list[str]]:
    """The switches on the way up from each node of a tree."""
    parents = {link.a: link.b for link in cluster.links}
    assert len(parents) == len(cluster.links)
    found = {}
    for node in cluster.nodes:
        path, point = [], node.name
        while point in parents:
            point = parents[point]
            path.append(point)
        found[node.name] = path
    return found


# ---- host lists


def naive_expand(parts: list[str | list[tuple[str, str]]]) -> list[str]:
    names = [""]
    for part in parts:
        if isinstance(part, str):
            names = [name + part for name in names]
        else:
            numbers = []
            for first, last in part:
                n = int(first)
                while n <= int(last):
                    numbers.append("0" * (len(first) - len(str(n))) + str(n))
                    n += 1
            names = [name + number for name in names for number in numbers]
    return names


digits = st.from_regex(r"[0-9]{1,3}", fullmatch=True)
ranges = st.tuples(digits, st.integers(0, 5)).map(lambda r: (r[0], str(int(r[0]) + r[1])))
words = st.from_regex(r"[a-z][a-z.-]{0,3}", fullmatch=True)
terms = st.lists(words | st.lists(ranges, min_size=1, max_size=2), min_size=1, max_size=4)


@given(terms)
def test_hostlists_expand_as_they_are_meant(parts: list[str | list[tuple[str, str]]]) -> None:
    text = "".join(
        part if isinstance(part, str) else f"[{','.join(f'{a}-{b}' for a, b in part)}]"
        for part in parts
    )
    assert expand(text, limit=26**4) == naive_expand(parts)


@given(st.lists(st.from_regex(r"[a-z]{0,2}[0-9]{0,4}[a-z]?", fullmatch=True).filter(bool)))
def test_hostlists_fold_and_expand_again(names: list[str]) -> None:
    assert (expand(fold(names)) if names else []) == names


@given(st.text(alphabet="a1,-[]09 ", max_size=12))
def test_any_text_expands_or_is_refused(text: str) -> None:
    with suppress(BadInput):
        assert all(set(name) <= set("a1-09") and name for name in expand(text))


def test_hostlists_are_short_where_numbers_run_on() -> None:
    assert fold(["a1", "a2", "a3", "a05", "a06", "b", "c9", "c10"]) == "a[1-3,05-06],b,c[9-10]"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a[1-999999999]", "'a[1-999999999]' stands for more than 65,536 names"),
        ("a[1-300]b[1-300]c", "more than 65,536 names"),
        ("a[1-999999999999999999999]", "is no number or range; write a[1-3,5,07-12]"),
        ("a[3-1]", "the range 3-1 in 'a[3-1]' runs backwards; write 1-3"),
        ("a[1-2", "the brackets of 'a[1-2' do not match"),
        ("a[[1]]", "do not match"),
        ("a]1[", "do not match"),
        ("a[]", "'' in 'a[]' is no number or range"),
        ("a,,b", "a name is missing in 'a,,b'"),
        ("", "a name is missing"),
        ("a b", "'a b' is no name"),
        ("a[x-z]", "'x-z' in 'a[x-z]' is no number or range"),
    ],
)
def test_bad_hostlists(text: str, sentence: str) -> None:
    with pytest.raises(BadInput) as error:
        expand(text, where="f:3")
    assert str(error.value).startswith("f:3: ")
    assert sentence in str(error.value)


# ---- Slurm


def test_slurm_tree(tmp_path: Path) -> None:
    cluster = read(tmp_path, TREE_CONF)
    assert above(cluster) == {
        "n1": ["s0", "spine"],
        "n2": ["s0", "spine"],
        "n3": ["s1", "spine"],
        "n05": ["s1", "spine"],
    }
    assert {(node.device, node.count) for node in cluster.nodes} == {("A40", 4)}
    # The slower LinkSpeed, that of the leaves, is the assumed 10 GB/s.
    assert links(cluster)["n1", "s0"] == 10 * GB
    assert links(cluster)["s0", "spine"] == 20 * GB
    assert {link.latency_s for link in cluster.links} == {2e-6}


def test_uplinks_carry_what_is_below_where_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("SwitchName=a Nodes=n[1-3]\nSwitchName=b Switches=a\n")
    cluster = read_topology(
        tmp_path / "f", Assumed(bandwidth_bytes_per_s=10 * GB, oversubscription=2)
    )
    assert links(cluster)["a", "b"] == 15 * GB


def test_crlf_and_a_byte_order_mark_make_no_difference(tmp_path: Path) -> None:
    plain = dedent(TREE_CONF).lstrip()
    windows = b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode()
    assert read(tmp_path, windows) == read(tmp_path, plain)


def test_slurm_blocks_and_the_larger_ones_they_form(tmp_path: Path) -> None:
    cluster = read(
        tmp_path,
        """
        # as Topograph writes it
        BlockName=b1 Nodes=n[01-02]
        # block002=nvl2
        BlockName=b2 Nodes=n[03-04]
        BlockName=b3 Nodes=n[05-06]
        BlockSizes=2,4
        """,
    )
    assert above(cluster)["n01"] == ["b1", "block4-0", "network"]
    assert above(cluster)["n03"] == ["b2", "block4-0", "network"]
    assert above(cluster)["n06"] == ["b3", "block4-1", "network"]


def test_slurm_yaml_tree_and_block(tmp_path: Path) -> None:
    text = """
        ---
        - topology: flat
          flat: true
        - topology: tree
          cluster_default: true
          tree:
            switches:
              - switch: root
                children: s[1-2]
              - switch: s1
                nodes: n[1-2]
              - switch: s2
                nodes: n3,n4
        """
    assert above(read(tmp_path, text))["n4"] == ["s2", "root"]
    blocks = """
        - topology: t
          block:
            block_sizes: [2, 4]
            blocks:
              - block: b1
                nodes: n[1-2]
              - block: b2
                nodes: n[3-4]
        """
    assert above(read(tmp_path, blocks))["n4"] == ["b2", "block4-0"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "SwitchName=a Nodes=n[1-2]\nSwitchName=b Nodes=n2\n",
            "/given:2: the host 'n2' is below 'a' already, since {}/given:1; put each host below",
        ),
        ("SwitchName=a Nodes=n1,n1\n", "/given:1: the host 'n1' is below 'a' already"),
        (
            "SwitchName=a Nodes=n1\nSwitchName=a Nodes=n2\n",
            "/given:2: the switch 'a' is given twice, first at {}/given:1",
        ),
        ("SwitchName=a Nodes=n[1-\n", "/given:1: the brackets of 'n[1-' do not match"),
        ("SwitchName=a Nodes=n[1-99999999]\n", "/given:1: 'n[1-99999999]' stands for more than"),
        (
            "\n\nSwitchName=a Switches=leaf1\nSwitchName=leaf0 Nodes=n1\n",
            "/given:3: the switch 'leaf1' below 'a' is described nowhere; the nearest known",
        ),
        (
            "SwitchName=a Switches=b\nSwitchName=b Switches=a\nSwitchName=c Nodes=n\n",
            "joined twice",
        ),
        (
            "SwitchName=a Switches=b\nSwitchName=b Switches=c\nSwitchName=c Switches=a Nodes=n\n",
            "switches lead in a circle: ",
        ),
        ("SwitchName=a Switches=a Nodes=n\n", "/given:1: 'a' is below itself"),
        ("SwitchName=a Nodez=n1\n", "/given:1: Nodez is an unknown key; the nearest known one is"),
        ("SwitchName=a n1\n", "/given:1: 'n1' is no KEY=VALUE; write SwitchName=s1 Nodes="),
        ("SwitchName=a Nodes=n1 Nodes=n2\n", "/given:1: Nodes is given twice"),
        ("SwitchName=a Nodes=n1\nNodes=n2\n", "/given:2: the line describes no switch or block"),
        ("SwitchName=a Nodes=n1 LinkSpeed=fast\n", "LinkSpeed is 'fast'; give a positive number"),
        ("SwitchName=a\n", "/given: there is no host"),
        ("SwitchName= Nodes=n1\n", "/given:1: a switch or block has no name"),
        (
            "SwitchName=n1 Nodes=n1\n",
            "/given:1: 'n1' is a switch and a host (the switch at {}/given:1); rename one of them",
        ),
        (
            "SwitchName=a Nodes=b\nSwitchName=b Nodes=c\n",
            "/given:1: 'b' is a switch and a host (the switch at {}/given:2)",
        ),
        (
            "BlockName=b1 Nodes=a[1-2]\nBlockName=b2 Nodes=b[2-3]\n",
            "/given:2: 'b2' is a switch and a host (the switch at {}/given:2)",
        ),
        (
            "BlockName=x Nodes=y\nBlockName=y Nodes=z\n",
            "/given:2: 'y' is a switch and a host (the host at {}/given:1)",
        ),
        ("SwitchName=a Nodes=n1\nSwitchName=b Nodes=n/2\n", "/given:2: 'n/2' is no host's name"),
        (f"BlockName=a Nodes=n1\nBlockSizes={'4' * 5000}\n", "/given:2: a block size is '4444"),
        ("SwitchName=a Nodes=n1\nBlockName=b Nodes=n2\n", "there are switches and blocks"),
        ("BlockName=a Nodes=n1\nBlockSizes=4,6\n", "the block size 6 follows 4; give a multiple"),
        ("BlockName=a Nodes=n1\nBlockSizes=many\n", "/given:2: a block size is 'many'"),
        ("- topology: x\n  tree: {switches: 3}\n", "/given:2: switches is 3; give a list"),
        (
            "- topology: x\n  tree:\n    switches:\n    - {switch: a, nodez: n}\n",
            "/given:4: nodez is an unknown key; the nearest known one is 'nodes'",
        ),
        (
            "- topology: x\n  tree:\n    switches:\n    - {nodes: n}\n",
            "/given:4: switch is missing",
        ),
    ],
)
def test_bad_slurm_files(tmp_path: Path, text: str, sentence: str) -> None:
    assert sentence.replace("{}", "") in refused(tmp_path, text)


def test_a_slurm_topology_that_tells_nothing(tmp_path: Path) -> None:
    sentence = refused(tmp_path, "- topology: all\n  flat: true\n", Unsupported)
    assert "/given:1: the topology 'all' has no tree or block (it has flat)" in sentence


# ---- Topograph and Kubernetes


def instances(*paths: tuple[str, list[str]], **more: Any) -> str:
    return json.dumps({"instances": [{"id": n, "network_layers": p, **more} for n, p in paths]})


def test_topograph_graph_of_one_and_of_four_layers(tmp_path: Path) -> None:
    flat = read(tmp_path, instances(("i1", ["sw"]), ("i2", ["sw"]), type="H100"))
    assert above(flat) == {"i1": ["sw"], "i2": ["sw"]}
    assert flat.nodes[0].device == "H100-SXM"
    deep = instances(
        ("i1", ["l1", "s1", "c1", "dc"]),
        ("i2", ["l2", "s1", "c1", "dc"]),
        ("i3", ["l3", "s2", "c2", "dc"]),
        labels={"accelerator.topograph.run/domain": "nvl-1"},
    )
    cluster = read(tmp_path, deep)
    assert above(cluster)["i3"] == ["l3", "s2", "c2", "dc"]
    assert cluster.switches == ("l1", "s1", "c1", "dc", "l2", "l3", "s2", "c2")
    assert cluster.nodes[0].labels == {"accelerator.topograph.run/domain": "nvl-1"}


def test_instances_of_several_fabrics_are_joined(tmp_path: Path) -> None:
    cluster = read(tmp_path, instances(("i1", ["a"]), ("i2", ["b"]), ("network", [])))
    assert above(cluster) == {
        "i1": ["a", "network-"],
        "i2": ["b", "network-"],
        "network": ["network-"],
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (instances(("i1", ["a"]), ("i1", ["a"])), "the instance 'i1' is given twice"),
        (
            json.dumps(
                {
                    "instances": [
                        {"id": "i1", "network_layers": ["a", "s1"]},
                        {"id": "i2", "network_layers": ["a", "s2"]},
                    ]
                },
                indent=1,
            ),
            "/given:10: 'a' lies in 's1' (at /given:3) and in 's2'; put it into one",
        ),
        (instances(("i1", ["a", "a"])), "'a' is below itself"),
        (instances(("i1", ["i2"]), ("i2", ["a"])), "'i2' is a switch and a host (the switch at "),
        (
            json.dumps({"instances": [{"id": "i1"}, {"id": "i/2"}]}, indent=1),
            "/given:6: 'i/2' is no host's name; use at most 253 ASCII letters, digits, ",
        ),
        ('{"instances": [{"network_layers": []}]}', "an instance has no id"),
        ('{"instances": {"a": 1}}', "instances is a mapping of length 1; give a list"),
        ('{"instances": [3]}', "instances[0] is 3; give a mapping"),
        ('{"instances": [{"id": "a", "network_layers": [4]}]}', "network_layers is 4; give text"),
        ('{"instances": []}', "there is no host"),
        ('{"instances": [{"id": "a",\n', "/given:2: this is no JSON: "),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_topograph_files(tmp_path: Path, text: str, sentence: str) -> None:
    assert sentence in refused(tmp_path, text)


def node(
    name: str, labels: dict[str, str], *, gpus: str | None = "8", ready: str = "True", **spec: Any
) -> dict[str, Any]:
    allocatable = {"cpu": "96"} | ({"nvidia.com/gpu": gpus} if gpus is not None else {})
    return {
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **labels}},
        "spec": spec,
        "status": {
            "allocatable": allocatable,
            "conditions": [
                {"type": "MemoryPressure", "status": "False"},
                {"type": "Ready", "status": ready},
            ],
        },
    }


def nodes(*items: dict[str, Any]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=2)


TIER = "fabric.topograph.run/tier-"
AWS = "topology.k8s.aws/network-node-layer-"
ZONE = "topology.kubernetes.io/zone"


def test_kubernetes_tiers_states_and_devices(tmp_path: Path) -> None:
    product = {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
    text = nodes(
        node("w1", {TIER + "0": "l1", TIER + "1": "s1", **product}),
        node("w2", {TIER + "0": "l1", TIER + "1": "s1"}, gpus="4"),
        node("w3", {TIER + "0": "l2", TIER + "1": "s1"}, unschedulable=True),
        node("w4", {TIER + "0": "l3", TIER + "1": "s2"}, ready="Unknown"),
        node("control", {}, gpus=None),
        node("broken", {}, ready="False"),
    )
    cluster = read(tmp_path, text)
    assert above(cluster) == {
        "w1": ["l1", "s1", "network"],
        "w2": ["l1", "s1", "network"],
        "w3": ["l2", "s1", "network"],
        "w4": ["l3", "s2", "network"],
    }
    assert [(n.device, n.count) for n in cluster.nodes[:2]] == [("A100-80GB-SXM", 8), ("A40", 4)]
    states = {n.name: n.labels.get("state") for n in cluster.nodes}
    assert states == {"w1": None, "w2": None, "w3": "drained", "w4": "drained"}
    assert read(tmp_path, yaml.safe_dump(json.loads(text))) == cluster


def wordy(name: str, labels: dict[str, str], **more: Any) -> dict[str, Any]:
    """A node with what a kubelet and controllers write besides."""
    found = node(name, labels, **more)
    found["metadata"]["annotations"] = {"volumes.kubernetes.io/managed": "true"}
    found["metadata"]["managedFields"] = [{"manager": "kubelet", "fieldsV1": {"f:status": {}}}]
    found["spec"]["taints"] = [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]
    found["status"]["capacity"] = found["status"]["allocatable"]
    found["status"]["images"] = [{"names": ["registry.k8s.io/pause:3.9"], "sizeBytes": 1}]
    return found


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
def test_what_the_filter_for_large_lists_keeps_is_the_same_cluster(tmp_path: Path) -> None:
    labels = {TIER + "0": "l1", ZONE: "z", "nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
    items = [
        wordy("w1", labels),
        wordy("w2", labels, gpus="4"),
        wordy("w3", labels, unschedulable=True),
        wordy("w4", labels, ready="Unknown"),
        wordy("control", {}, gpus=None),
        {"kind": "Node", "metadata": {"name": "bare"}},
    ]
    text = nodes(*items)
    done = subprocess.run(shlex.split(SHRINK), input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) < len(text) / 2
    assert read(tmp_path, done.stdout) == read(tmp_path, text)
    assert "taints" in done.stdout


def test_kubernetes_cloud_labels_count_from_the_other_end(tmp_path: Path) -> None:
    text = nodes(
        node("a", {AWS + "1": "n1", AWS + "2": "n2", AWS + "3": "n3", AWS + "4": "n4", ZONE: "z"}),
        node("b", {AWS + "1": "n1", AWS + "2": "n2", AWS + "3": "n5", AWS + "4": "n6", ZONE: "z"}),
    )
    assert above(read(tmp_path, text)) == {
        "a": ["n4", "n3", "n2", "n1"],
        "b": ["n6", "n5", "n2", "n1"],
    }


def test_racks_of_one_number_in_two_zones_are_two(tmp_path: Path) -> None:
    rack = "topology.kubernetes.io/rack"
    text = nodes(node("a", {rack: "1", ZONE: "x"}), node("b", {rack: "1", ZONE: "y"}))
    assert above(read(tmp_path, text)) == {
        "a": ["x/1", "x", "network"],
        "b": ["y/1", "y", "network"],
    }


def test_kubernetes_nodes_without_labels_hang_on_one_switch(tmp_path: Path) -> None:
    text = nodes(node("a", {}, gpus=None), node("b", {}, gpus=None))
    assert above(read(tmp_path, text)) == {"a": ["network"], "b": ["network"]}


def test_a_node_may_lack_the_widest_tiers_but_none_between(tmp_path: Path) -> None:
    whole = node("a", {TIER + "0": "l1", TIER + "1": "s1", TIER + "2": "c1"})
    short = node("b", {TIER + "0": "l2"})
    assert above(read(tmp_path, nodes(whole, short)))["b"] == ["l2", "network"]
    gap = node("b", {TIER + "0": "l2", TIER + "2": "c1"})
    assert f"'b' has no label {TIER}1, which others have" in refused(tmp_path, nodes(whole, gap))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (nodes(node("a", {}), node("a", {})), "the node 'a' is given twice"),
        (
            nodes(node("a", {TIER + "0": "l"}), node("b", {})),
            ":32: the node 'b' has no label fabric.topograph.run/tier-0, which others have",
        ),
        (nodes(node("a", {}, gpus="eight")), "nvidia.com/gpu is 'eight'; give a whole number"),
        (
            nodes(node("a", {}), node("nöde", {})),
            "/given:31: 'nöde' is no host's name; use at most",
        ),
        (nodes(node("a", {}, gpus="9" * 5000)), "nvidia.com/gpu is '9999"),
        ('{"items": [{"metadata": {}}]}', "items[0].metadata.name is None; give text"),
        ('{"items": 7}', "items is 7; give a list"),
        ('{"items": []}', "there is no host"),
        (nodes(node("a", {}))[:120], "this is no JSON"),
    ],
)
def test_bad_kubernetes_files(tmp_path: Path, text: str, sentence: str) -> None:
    assert sentence in refused(tmp_path, text)


# ---- NCCL

SYSTEM = """<system version="1">
  <cpu numaid="0" affinity="ffff" arch="x86_64" vendor="GenuineIntel" familyid="6" modelid="143">
    <pci busid="0000:15:00.0" class="0x060400" link_speed="32.0 GT/s PCIe" link_width="16">
      <pci busid="0000:17:00.0" class="0x030200" link_speed="32.0 GT/s PCIe" link_width="16">
        <gpu dev="0" sm="90" rank="0" gdr="1">
          <nvlink target="0000:07:00.0" count="10" tclass="0x068000"/>
          <nvlink target="0000:08:00.0" count="8" tclass="0x068000"/>
        </gpu>
      </pci>
      <pci busid="0000:18:00.0" class="0x020700" link_speed="32.0 GT/s PCIe" link_width="16">
        <nic>
          <net name="mlx5_0" dev="0" speed="400000" port="1" guid="0x1" maxconn="131072" gdr="1"/>
        </nic>
      </pci>
    </pci>
  </cpu>
  <cpu numaid="1" affinity="ffff0000" arch="x86_64">
    <pci busid="0000:97:00.0" class="0x030200" link_speed="32.0 GT/s PCIe" link_width="16">
      <gpu dev="1" sm="90" rank="1" gdr="1">
        <nvlink target="0000:07:00.0" count="18" tclass="0x068000"/>
      </gpu>
    </pci>
    <pci busid="0000:98:00.0" class="0x020700">
      <nic><net name="mlx5_1" dev="1" speed="200000" port="1"/></nic>
    </pci>
  </cpu>
</system>
"""

GRAPHS = """<graphs version="1">
  <graph id="0" pattern="4" crossnic="0" nchannels="2" speedintra="20" speedinter="20"
         typeintra="NVL" typeinter="PIX" samechannels="0">
    <channel><net dev="0"/><gpu dev="0"/><gpu dev="1"/><gpu dev="2"/><net dev="0"/></channel>
    <channel><net dev="1"/><gpu dev="1"/><gpu dev="0"/><gpu dev="2"/><net dev="1"/></channel>
  </graph>
  <graph id="1" pattern="1" nchannels="1" speedintra="40"><channel/></graph>
</graphs>
"""


def test_nccl_topology_dump(tmp_path: Path) -> None:
    cluster = read(tmp_path, SYSTEM)
    (machine,) = cluster.nodes
    assert (machine.name, machine.device, machine.count) == ("given", "H100-SXM", 2)
    assert machine.inside.bandwidth_bytes_per_s == 18 * 25e9
    assert machine.labels == {"nics": "mlx5_0,mlx5_1"}
    assert links(cluster) == {("given", "rail0"): 50e9, ("given", "rail1"): 25e9}


def test_gpus_without_nvlink_are_joined_by_pcie(tmp_path: Path) -> None:
    text = "\n".join(line for line in SYSTEM.splitlines() if "nvlink" not in line)
    assert read(tmp_path, text).nodes[0].inside.bandwidth_bytes_per_s == 16 * 3.938e9


def test_nccl_dump_of_an_nvlink_domain_has_its_machines(tmp_path: Path) -> None:
    text = SYSTEM.replace('numaid="0"', 'numaid="0" host_hash="0xa"')
    text = text.replace('numaid="1"', 'numaid="1" host_hash="0xb"')
    cluster = read(tmp_path, text)
    assert [(n.name, n.count) for n in cluster.nodes] == [("given-0", 1), ("given-1", 1)]
    assert links(cluster) == {("given-0", "rail0"): 50e9, ("given-1", "rail1"): 25e9}


def test_nccl_graph_dump(tmp_path: Path) -> None:
    cluster = read(tmp_path, GRAPHS)
    assert cluster.nodes[0].count == 3
    assert cluster.nodes[0].inside.bandwidth_bytes_per_s == 40e9
    assert links(cluster) == {("given", "rail0"): 20e9, ("given", "rail1"): 20e9}


BOMB = """<?xml version="1.0"?>
<!DOCTYPE lolz [ <!ENTITY a "ha"> <!ENTITY b "&a;&a;&a;"> ]>
<system>&b;</system>
"""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (SYSTEM[:400], "/given:6: this is no XML: "),
        (BOMB, "/given:2: there is a document type or entity; leave <!DOCTYPE and <!ENTITY out"),
        ('<!DOCTYPE x SYSTEM "file:///etc/passwd"><system/>', "there is a document type"),
        ("<system>&xxe;</system>", "/given:1: this is no XML: undefined entity"),
        ("<a>" * 100, "'a' is nested too deeply; nest at most 64 levels"),
        ("<system>" + "<x/>" * 200_001 + "</system>", "there are more than 200,000 elements"),
        ("<html/>", "/given:1: the XML begins with <html>; give "),
        ("<system/>", "/given:1: there is no cpu with GPUs"),
        (SYSTEM.replace('count="18"', 'count="many"'), "/given:20: count of <nvlink> is 'many'"),
        ("<graphs/>", "/given:1: there is no graph 0, the ring"),
        ('<graphs><graph id="0"/></graphs>', "/given:1: the ring has no GPU"),
    ],
)
def test_bad_nccl_files(tmp_path: Path, text: str, sentence: str) -> None:
    assert sentence in refused(tmp_path, text)


# ---- ibnetdiscover

FABRIC = """#
# Topology file: generated on Mon Nov  2 10:00:00 2026
#
# Initiated from node 0c42a10300a10001 port 0c42a10300a10001

vendid=0x2c9
devid=0xd2f2
sysimgguid=0xb8cef60300000001
switchguid=0xb8cef60300000001(b8cef60300000001)
Switch\t41 "S-b8cef60300000001"\t\t# "MF0;leaf-1:MQM8700/U1" enhanced port 0 lid 1 lmc 0
[1]\t"H-0c42a10300a10001"[1](c42a10300a10001) \t\t# "node01 mlx5_0" lid 5 4xHDR
[2]\t"H-0c42a10300a10002"[1](c42a10300a10002) \t\t# "node02 mlx5_0" lid 6 2xHDR
[21]\t"S-b8cef60300000003"[1]\t\t# "MF0;spine-1:MQM8700/U1" lid 3 4xHDR
[22]\t"S-b8cef60300000003"[2]\t\t# "MF0;spine-1:MQM8700/U1" lid 3 4xHDR
[41]\t"H-b8cef60300000009"[1](b8cef60300000009) \t\t# "Mellanox Technologies Aggregation Node" \
lid 9 4xHDR

vendid=0x2c9
switchguid=0xb8cef60300000002(b8cef60300000002)
Switch\t41 "S-b8cef60300000002"\t\t# "Quantum Mellanox Technologies" base port 0 lid 2 lmc 0
[1]\t"H-0c42a10300a10003"[1](c42a10300a10003) \t\t# "node03 HCA-1" lid 7 4xHDR
[2]\t"H-0c42a10300a10004"[1](c42a10300a10004) \t\t# "MT4123 ConnectX6 Mellanox" lid 8 4xEDR
[21]\t"S-b8cef60300000003"[3]\t\t# "MF0;spine-1:MQM8700/U1" lid 3 4xHDR

switchguid=0xb8cef60300000003(b8cef60300000003)
Switch\t41 "S-b8cef60300000003"\t\t# "MF0;spine-1:MQM8700/U1" base port 0 lid 3 lmc 0
[1]\t"S-b8cef60300000001"[21]\t\t# "MF0;leaf-1:MQM8700/U1" lid 1 4xHDR
[2]\t"S-b8cef60300000001"[22]\t\t# "MF0;leaf-1:MQM8700/U1" lid 1 4xHDR
[3]\t"S-b8cef60300000002"[21]\t\t# "Quantum Mellanox Technologies" lid 2 4xHDR

caguid=0xb8cef60300000009
Ca\t1 "H-b8cef60300000009"\t\t# "Mellanox Technologies Aggregation Node"
[1](b8cef60300000009) \t"S-b8cef60300000001"[41]\t\t# lid 9 lmc 0 "MF0;leaf-1" lid 1 4xHDR

caguid=0xc42a10300a10001
Ca\t1 "H-0c42a10300a10001"\t\t# "node01 mlx5_0"
[1](c42a10300a10001) \t"S-b8cef60300000001"[1]\t\t# lid 5 lmc 0 "MF0;leaf-1" lid 1 4xHDR

caguid=0xc42a10300a10002
Ca\t1 "H-0c42a10300a10002"\t\t# "node02 mlx5_0"
[1](c42a10300a10002) \t"S-b8cef60300000001"[2]\t\t# lid 6 lmc 0 "MF0;leaf-1" lid 1 2xHDR

caguid=0xc42a10300a10003
Ca\t1 "H-0c42a10300a10003"\t\t# "node03 HCA-1"
[1](c42a10300a10003) \t"S-b8cef60300000002"[1]\t\t# lid 7 lmc 0 "Quantum" lid 2 4xHDR

caguid=0xc42a10300a10004
Ca\t1 "H-0c42a10300a10004"\t\t# "MT4123 ConnectX6 Mellanox"
[1](c42a10300a10004) \t"S-b8cef60300000002"[2]\t\t# lid 8 lmc 0 "Quantum" lid 2 4xEDR
"""


def test_ibnetdiscover(tmp_path: Path) -> None:
    cluster = read(tmp_path, FABRIC)
    assert links(cluster) == {
        ("node01", "leaf-1"): 25e9,
        ("node02", "leaf-1"): 12.5e9,
        ("leaf-1", "spine-1"): 50e9,
        ("node03", "S-b8cef60300000002"): 25e9,
        ("H-0c42a10300a10004", "S-b8cef60300000002"): 12.5e9,
        ("S-b8cef60300000002", "spine-1"): 25e9,
    }
    assert set(cluster.switches) == {"leaf-1", "S-b8cef60300000002", "spine-1"}


def test_two_adapters_of_one_host_are_its_rails(tmp_path: Path) -> None:
    cluster = read(tmp_path, FABRIC.replace("node03 HCA-1", "node01 mlx5_1"))
    assert len(cluster.nodes) == 3
    assert links(cluster)["node01", "S-b8cef60300000002"] == 25e9
    assert links(cluster)["node01", "leaf-1"] == 25e9


def test_a_description_of_one_word_is_the_host(tmp_path: Path) -> None:
    cluster = read(tmp_path, FABRIC.replace("MT4123 ConnectX6 Mellanox", "gpu-4"))
    assert links(cluster)["gpu-4", "S-b8cef60300000002"] == 12.5e9


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            FABRIC[: FABRIC.index("caguid=0xc42a10300a10004")],
            "/given:21: 'H-0c42a10300a10004' is described nowhere; give the whole output",
        ),
        (FABRIC[:900], "is described nowhere"),
        (FABRIC.replace("2xHDR", "2xQXR"), "/given:12: 2xQXR is no known speed; known are SDR"),
        (FABRIC + "what is this\n", "'what is this' is no line of ibnetdiscover"),
        (FABRIC.replace('[1]\t"H-0c42a10300a10001"', "[1]\tH-0c42"), "/given:11: "),
        (FABRIC.replace("[22]\t", "[21]\t"), "/given:14: port 21 of 'S-b8cef60300000001' is given"),
        ('vendid=0x2c9\n[1] "S-1"[1]\n', "/given:2: a port comes before any switch"),
        (FABRIC + 'Ca\t1 "H-0c42a10300a10004"\t# "x"\n', "'H-0c42a10300a10004' is given twice"),
        (f'Switch\t1 "S-1"\t# "x"\n[{"1" * 5000}] "H-1"[1]\n', "/given:2: '[1111"),
        ('Ca\t1 "H-1"\t# "a/b mlx5_0"\n', "/given:1: 'a/b' is no host's name; use at most"),
        ('vendid=0x2c9\nSwitch\t41 "S-1"\t# "x" lid 1\n', "there is no host"),
    ],
)
def test_bad_ibnetdiscover_files(tmp_path: Path, text: str, sentence: str) -> None:
    assert sentence in refused(tmp_path, text)


# ---- measurements


def noisy_matrix(
    leaf_of: list[int], pod_of: list[int], rates: tuple[float, float, float], seed: int
) -> list[list[float | None]]:
    noise = random.Random(seed)
    count = len(leaf_of)

    def rate(i: int, j: int) -> float | None:
        if i == j:
            return None
        tier = 0 if leaf_of[i] == leaf_of[j] else 1 if pod_of[i] == pod_of[j] else 2
        return rates[tier] * noise.uniform(0.95, 1.05)

    return [[rate(i, j) for j in range(count)] for i in range(count)]


@given(st.integers(0, 10_000), st.permutations(range(12)))
def test_the_tiers_of_a_noisy_matrix_are_the_true_ones(seed: int, order: list[int]) -> None:
    """Three pods of two leaves of two hosts, whose hosts come in any order."""
    leaf_of, pod_of = [i // 2 for i in order], [i // 4 for i in order]
    found = Measurement(
        hosts=tuple(f"h{i}" for i in order),
        bandwidth_bytes_per_s=tuple(
            map(tuple, noisy_matrix(leaf_of, pod_of, (12.5e9, 6e9, 2e9), seed))
        ),
    )
    tiers = tiers_of(found)
    assert len(tiers) == 3
    for tier, truth in zip(tiers, (leaf_of, pod_of, [0] * 12), strict=True):
        labels = np.array(tier.domain_of)
        same = labels[:, None] == labels[None, :]
        assert (same == (np.array(truth)[:, None] == np.array(truth)[None, :])).all()
    assert [tier.bandwidth_bytes_per_s for tier in tiers] == pytest.approx(
        [12.5e9, 6e9, 2e9], rel=0.05
    )


def test_a_measured_cluster(tmp_path: Path) -> None:
    matrix = noisy_matrix([0, 1, 0, 1], [0, 0, 0, 0], (10e9, 2e9, 1), 3)
    text = json.dumps({"hosts": ["a", "b", "c", "core"], "bandwidth_bytes_per_s": matrix})
    cluster = read(tmp_path, text)
    assert above(cluster) == {
        "a": ["tier1-0", "core_"],
        "b": ["tier1-1", "core_"],
        "c": ["tier1-0", "core_"],
        "core": ["tier1-1", "core_"],
    }
    assert links(cluster)["a", "tier1-0"] == pytest.approx(10e9, rel=0.05)
    assert links(cluster)["tier1-0", "core_"] == pytest.approx(2e9, rel=0.05)


def test_pairs_that_were_measured_at_once_shared_the_uplink(tmp_path: Path) -> None:
    """Four of eight hosts: on average 16/7 pairs cross, each one way at a time."""
    matrix = noisy_matrix([0, 0, 0, 0, 1, 1, 1, 1], [0] * 8, (10e9, 2e9, 1), 3)
    found = {"hosts": list("abcdefgh"), "bandwidth_bytes_per_s": matrix, "at_once": True}
    uplink = links(read(tmp_path, json.dumps(found)))["tier1-0", "core"]
    assert uplink == pytest.approx(2e9 * 16 / 7 / 2, rel=0.05)


def test_hosts_that_are_equally_near_hang_on_one_switch(tmp_path: Path) -> None:
    table = "host,a,b,c\na,,10 Gb/s,1.3e9\nb,10 Gb/s,-,1.2e9\nc,1.25e9,1.25 GB/s,0\n"
    cluster = read(tmp_path, table)
    assert above(cluster) == {"a": ["core"], "b": ["core"], "c": ["core"]}
    assert links(cluster)["a", "core"] == pytest.approx(1.26e9, rel=0.01)


def test_one_measured_host_needs_no_network(tmp_path: Path) -> None:
    cluster = read(tmp_path, '{"hosts": ["a"], "bandwidth_bytes_per_s": [[null]]}')
    assert (len(cluster.nodes), cluster.switches, cluster.links) == (1, (), ())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("host,a,b\na,,1\n", "bandwidth_bytes_per_s has 1 rows for 2 hosts; give one for each"),
        ("host,a,b\nb,,1\na,1,\n", "/given:2: the row is named 'b'; name rows as the columns"),
        ("host,a,b\na,,fast\nb,1,\n", "/given:2: 'fast' is no bandwidth; write 12.5e9"),
        ("host,a,b\na,,1,3\nb,1,\n", "/given:2: the row has 3 values for 2 hosts"),
        ("host,a,b\na,,-1\nb,1,\n", "from 'a' to 'b' it is -1.0; give a positive number"),
        ("host,a,a\na,,1\na,1,\n", "the host 'a' is given twice"),
        ('host,a,b\na,,"1\nb,1,\n', "/given: this is no CSV: "),
        ("\nhost,a b,c/d\na b,,1\nc/d,1,\n", "/given:2: hosts[0]: 'a b' is no host's name; use"),
        (
            '{"hosts": [\n"a",\n"c/d"],\n"bandwidth_bytes_per_s": [[null, 1], [1, null]]}',
            "/given:3: hosts[1]: 'c/d' is no host's name; use",
        ),
        (
            '{"hosts": ["a", "b"], "bandwidth_bytes_per_s": [[null, null], [1, null]]}',
            "from 'a' to 'b' it is None; give a positive number",
        ),
        ('{"hosts": ["a"], "bandwidth_bytes_per_s": [[1]], "speed": 1}', "speed is an unknown key"),
    ],
)
def test_bad_measurements(tmp_path: Path, text: str, sentence: str) -> None:
    assert sentence in refused(tmp_path, text)


# ---- all of them


def test_clusters_and_hostfiles_are_read_as_ever(tmp_path: Path) -> None:
    cluster = read(tmp_path, TREE_CONF)
    write_cluster(cluster, tmp_path / "cluster.yaml")
    assert (
        read_topology(tmp_path / "cluster.yaml")
        == cluster
        == Cluster.read(tmp_path / "cluster.yaml")
    )
    (tmp_path / "cluster.json").write_text(cluster.model_dump_json())
    assert read_topology(tmp_path / "cluster.json") == cluster
    hosts = read(tmp_path, "# mine\nworker-1 slots=2\nworker-2 slots=2\n")
    assert [(n.name, n.device, n.count) for n in hosts.nodes] == [
        ("worker-1", "A40", 2),
        ("worker-2", "A40", 2),
    ]


@pytest.mark.parametrize(
    "text", [FABRIC, SYSTEM, GRAPHS, TREE_CONF, nodes(node("a", {"rack": "é"}))]
)
def test_any_imported_cluster_is_written_and_read_back(tmp_path: Path, text: str) -> None:
    cluster = read(tmp_path, text)
    write_cluster(cluster, tmp_path / "cluster.yaml")
    assert Cluster.read(tmp_path / "cluster.yaml") == cluster


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xff\xfeS\x00", "/given:1: byte 0xff is not UTF-8"),
        (b"SwitchName=a Nodes=n1\nSwitchName=\xe9 Nodes=n2\n", "/given:2: byte 0xe9 is not UTF-8"),
        (b"  \n", "/given: the file is empty"),
        (b"hello world\n", "/given: this is no known topology; give a trimtab cluster (YAML), "),
        (b"{}", "or a DeepSpeed hostfile."),
        (b"[1, 2]", "this is no known topology"),
        (b"a: &a [x, x]\nb: [*a, *a]\n", "this is no known topology"),
        (b"nodes: [{name: a}]\n", "/given:1: nodes[0].device is missing"),
    ],
)
def test_what_is_no_topology(tmp_path: Path, content: bytes, sentence: str) -> None:
    assert sentence in refused(tmp_path, content)


def test_a_cluster_of_twelve_thousand_nodes_goes_through_a_file(tmp_path: Path) -> None:
    leaves = "".join(f"SwitchName=l{i} Nodes=n[{i * 32}-{i * 32 + 31}]\n" for i in range(390))
    cluster = read(tmp_path, leaves + "SwitchName=core Switches=l[0-389]\n")
    write_cluster(cluster, tmp_path / "cluster.yaml")
    again = read_topology(tmp_path / "cluster.yaml")
    assert len(again.nodes) == 12_480
    assert again == cluster


WHOLE = [
    FABRIC,
    SYSTEM,
    GRAPHS,
    dedent(TREE_CONF),
    nodes(node("a", {TIER + "0": "l", ZONE: "x"}), node("b", {TIER + "0": "m", ZONE: "y"})),
    instances(("i1", ["a", "s"]), ("i2", ["b", "s"])),
    json.dumps({"hosts": ["a", "b"], "bandwidth_bytes_per_s": [[None, 1e9], [2e9, None]]}),
    "host,a,b\na,,1e9\nb,1 GB/s,\n",
    "- topology: t\n  block:\n    block_sizes: [1]\n    blocks: [{block: b, nodes: 'n[1-2]'}]\n",
    "- topology: t\n  tree: {switches: [{switch: r, children: s}, {switch: s, nodes: n}]}\n",
    "a slots=2\nb slots=3\n",
]
PIECES = [
    "",
    "\n",
    ",",
    "[",
    "]",
    "{",
    "}",
    '"',
    ":",
    "=",
    "-",
    "0",
    "-1",
    "9" * 30,
    "null",
    "<",
    ">",
]
damage = st.tuples(st.integers(0, 1), st.floats(0, 1), st.integers(0, 40), st.sampled_from(PIECES))


@given(st.sampled_from(WHOLE), st.lists(damage, min_size=1, max_size=3))
def test_a_damaged_file_is_read_or_refused_and_never_a_fault(
    tmp_path_factory: pytest.TempPathFactory,
    text: str,
    harm: list[tuple[int, float, int, str]],
) -> None:
    for cut, at, length, piece in harm:
        begin = int(at * len(text))
        text = text[:begin] if cut else text[:begin] + piece + text[begin + length :]
    with suppress(BadInput):
        assert read(tmp_path_factory.getbasetemp(), text, "damaged").nodes


def test_too_large_a_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(257 * 2**20)
    with pytest.raises(BadInput, match="larger than 268,435,456 bytes; give a smaller one; jq -c"):
        read_topology(path)


def test_each_format_has_a_limit_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = nodes(node("a", {}), node("b", {}))
    monkeypatch.setattr(reading, "MAX_TOPOLOGY_BYTES", len(text) - 1)
    assert len(read(tmp_path, f"\n {text}").nodes) == 2
    conf = "SwitchName=a Nodes=n1\n".ljust(len(text), "#")
    assert "bytes and no JSON; give a smaller one" in refused(tmp_path, conf)
    monkeypatch.setattr(reading, "MAX_CLUSTER_VALUES", 20)
    assert "more than 20 values" in refused(tmp_path, yaml.safe_dump(json.loads(text)))
    monkeypatch.setattr(reading, "MAX_JSON_MARKS", 10)
    assert "there are more than 10 values; give a smaller file" in refused(tmp_path, text)


def test_import_writes_what_it_read(tmp_path: Path, site: Any) -> None:
    (site.root / "topology.conf").write_text(dedent(TREE_CONF))
    arguments = ("--device", "A40", "--devices-per-node", "4", "--bandwidth", "10 GB/s")
    done = site.trimtab("import", "topology.conf", "--out", "c.yaml", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "c.yaml: 4 nodes (16 A40), 3 switches, 6 links\n"
    printed = site.trimtab("import", "topology.conf", *arguments).stdout
    assert printed == (site.root / "c.yaml").read_text()
    assert len(Cluster.read(site.root / "c.yaml").nodes) == 4
    wrong = site.trimtab("import", "topology.conf", "--bandwidth", "0")
    assert wrong.returncode == 2
    assert "--bandwidth is '0'; give a positive quantity" in wrong.stderr
    pipe = site.trimtab("import", "topology.conf", "--out", "/dev/stdout", *arguments)
    assert pipe.stdout == printed + "/dev/stdout: 4 nodes (16 A40), 3 switches, 6 links\n"
