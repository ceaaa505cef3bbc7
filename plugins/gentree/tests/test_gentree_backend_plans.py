"""What the backend decides without torch: its network, its plans, and what a launch tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.core.cluster import Cluster, Link, Node
from trimtab.core.collectives import NetworkTree, check_plan, programme
from trimtab.core.cost import Constants
from trimtab.core.errors import BadInput
from trimtab.core.hooks import plugin
from trimtab.core.launch import LaunchRequest
from trimtab.gentree.backend import GroupPlans, Network


def rack(count: int) -> Cluster:
    return Cluster(
        nodes=tuple(Node(name=f"h{i}", device="cpu") for i in range(count)),
        switches=("s",),
        links=tuple(Link(a=f"h{i}", b="s", bandwidth_bytes_per_s=1e9) for i in range(count)),
    )


@pytest.fixture
def topology(tmp_path: Path) -> str:
    path = tmp_path / "rack.yaml"
    path.write_text(rack(4).model_dump_json())
    return str(path)


def test_payloads_of_one_size_class_have_one_plan() -> None:
    plans = GroupPlans(NetworkTree.of_cluster(rack(4)), range(4), Constants(), always=True)
    small, same, large = plans.schedule(1000), plans.schedule(1024), plans.schedule(2**28)
    assert small is same
    assert small is not None
    assert large is not None
    check_plan(small)
    check_plan(large)
    assert len(small.steps) <= len(large.steps)
    assert plans.schedule(0) is None


def test_the_base_backend_does_what_it_does_best() -> None:
    """A ring of two ranks is what there is to do, so a plan gains nothing."""
    free = Constants(alpha_s=0, delta_s_per_byte=0)
    tree = NetworkTree.of_cluster(rack(2))
    assert GroupPlans(tree, range(2), free, always=False).schedule(2**20) is None
    assert GroupPlans(tree, range(2), free, always=True).schedule(2**20) is not None
    alone = NetworkTree.of_cluster(rack(1))
    assert GroupPlans(alone, [0], free, always=True).schedule(2**20) is None


def test_the_base_backends_messages_count_on_shared_processors() -> None:
    """They take its ring 22 ms, and all bytes 2 ms."""
    tree = NetworkTree.of_cluster(rack(8))
    constants = Constants(alpha_s=0, message_s=1e-4, processors=1)
    schedule = GroupPlans(tree, range(8), constants, always=False).schedule(2**20)
    assert schedule is not None
    assert sum(len(turn.sends) for rank in range(8) for turn in programme(schedule, rank)) < 56


def test_the_network_of_the_environment(topology: str, tmp_path: Path) -> None:
    assert Network.of_environment({}) is None
    constants = tmp_path / "constants.yaml"
    constants.write_text("alpha_s: 1 ms\n")
    network = Network.of_environment(
        {
            "TRIMTAB_GENTREE_TOPOLOGY": topology,
            "TRIMTAB_GENTREE_CONSTANTS": str(constants),
            "TRIMTAB_GENTREE_ALWAYS": "1",
            "TRIMTAB_GENTREE_CUDA": "0",
        }
    )
    assert network is not None
    assert (len(network.cluster.nodes), network.constants.alpha_s) == (4, 1e-3)
    assert (network.always, network.cuda) == (True, False)
    on_gpus = Network.of_environment(
        {"TRIMTAB_GENTREE_TOPOLOGY": topology, "TRIMTAB_GENTREE_CUDA": "1"}
    )
    assert on_gpus is not None
    assert (on_gpus.always, on_gpus.cuda) == (False, True)
    with pytest.raises(BadInput, match="no such file"):
        Network.of_environment({"TRIMTAB_GENTREE_TOPOLOGY": "nowhere.yaml"})
    dead = Path(topology).read_text().replace("1000000000.0", "0", 1)
    (tmp_path / "dead.yaml").write_text(dead)
    with pytest.raises(BadInput, match="bandwidth_bytes_per_s is 0"):
        Network.of_environment({"TRIMTAB_GENTREE_TOPOLOGY": str(tmp_path / "dead.yaml")})


def test_a_launch_tells_every_rank(topology: str) -> None:
    request = LaunchRequest("deepspeed", ("deepspeed", "t.py"), {}, {"h0": 1, "h1": 1})
    change = plugin("gentree").launch({"topology": topology}, request)
    assert change is not None
    assert change.environment == {
        "TRIMTAB_BACKEND": "gentree",
        "TRIMTAB_GENTREE_TOPOLOGY": str(Path(topology).absolute()),
    }
    assert change.hosts == {}
    change = plugin("gentree").launch({"topology": topology, "always": True, "cuda": True}, request)
    assert change is not None
    assert {change.environment[f"TRIMTAB_GENTREE_{name}"] for name in ("ALWAYS", "CUDA")} == {"1"}


@pytest.mark.parametrize(
    ("options", "hosts", "message"),
    [
        ({}, {}, "topology"),
        ({"topology": "nowhere.yaml"}, {}, "no such file"),
        ({"topology": "RACK", "topolgy": 1}, {}, "topolgy"),
        ({"topology": "RACK"}, {"h9": 1}, "no node 'h9'"),
        ({"topology": "RACK"}, {"h1": 2}, "which has 1"),
    ],
)
def test_wrong_options_are_refused_before_the_launch(topology, options, hosts, message) -> None:
    given = {key: topology if value == "RACK" else value for key, value in options.items()}
    request = LaunchRequest("deepspeed", ("deepspeed", "t.py"), {}, hosts)
    with pytest.raises(BadInput, match=message):
        plugin("gentree").launch(given, request)
