from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.cluster import Cluster
from trimtab.core.errors import BadInput, Infeasible
from trimtab.core.plan import Plan
from trimtab.placement.fabric import Fabric, domains, natural, states_of
from trimtab.placement.job import TrainingJob
from trimtab.placement.planner import plan_placement
from trimtab.placement.summary import group_spreads

LINK = {"bandwidth_bytes_per_s": 50e9}


def tree(pods: int, leaves: int, nodes: int, *, rails: int = 1, **labels: str) -> Cluster:
    """Pods of leaves of nodes; with several rails each node has a cable to each of them."""
    names, links, switches = [], [], ["core"]
    for pod in range(pods):
        switches.append(f"spine{pod}")
        links.append({"a": f"spine{pod}", "b": "core"} | LINK)
        for leaf in range(pod * leaves, (pod + 1) * leaves):
            for rail in range(rails):
                switches.append(f"leaf{leaf}r{rail}")
                links.append({"a": f"leaf{leaf}r{rail}", "b": f"spine{pod}"} | LINK)
            for _ in range(nodes):
                name = f"n{len(names)}"
                names.append(name)
                links += [{"a": name, "b": f"leaf{leaf}r{rail}"} | LINK for rail in range(rails)]
    return Cluster.model_validate(
        {
            "nodes": [
                {"name": n, "device": "H100-SXM", "count": 8}
                | ({"labels": {"state": labels[n]}} if n in labels else {})
                for n in names
            ],
            "switches": switches,
            "links": links,
        }
    )


def job(**values: Any) -> TrainingJob:
    return TrainingJob.model_validate({"tensor_parallel": 8, "alpha": 0.3} | values)


def used(plan: Plan) -> list[str]:
    return list(dict.fromkeys(slot.node for slot in plan.ranks))


@pytest.mark.parametrize("rails", [1, 4])
def test_tiers_follow_from_the_links(rails: int) -> None:
    fabric = Fabric.of(tree(3, 2, 4, rails=rails))
    assert fabric.tiers == ("pod", "leaf")
    assert [len(p) for p in domains(fabric.places, 0).values()] == [8, 8, 8]
    assert [len(p) for p in domains(fabric.places, 1).values()] == [4] * 6


def test_one_switch_has_no_tiers(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\n")
    fabric = Fabric.of(Cluster.from_hostfile(tmp_path / "hosts"))
    assert fabric.tiers == ()
    assert list(domains(fabric.places, 0)) == ["network"]


def test_names_sort_by_their_numbers() -> None:
    assert sorted(["n10", "n2", "m3"], key=natural) == ["m3", "n2", "n10"]
    long = [f"n{'7' * digits}" for digits in (5000, 4999)]
    assert sorted(long, key=natural) == long[::-1]


def by_integers(name: str) -> list[tuple[int, int, str]]:
    parts = re.findall(r"\d+|\D+", name, re.ASCII)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


@given(st.lists(st.text("ab-0129", max_size=8)))
def test_numbers_in_names_sort_as_integers_do(names: list[str]) -> None:
    assert sorted(names, key=natural) == sorted(names, key=by_integers)


def test_a_plan_gives_each_rank_a_device_of_its_own() -> None:
    plan = plan_placement(tree(3, 2, 4), job(pipeline_parallel=2, data_parallel=8))
    assert len(plan.ranks) == 128
    assert len(set(plan.ranks)) == 128
    assert [slot.device for slot in plan.ranks] == list(range(8)) * 16


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_spreads_recounted_from_ranks_are_those_claimed(order: str, alpha: float) -> None:
    cluster = tree(4, 2, 5)
    training = job(pipeline_parallel=4, data_parallel=6, order=order)
    plan = plan_placement(cluster, training, alpha=alpha)
    pod = {place.name: place.path[0] for place in Fabric.of(cluster).places}

    def widest(kind: Any) -> int:
        groups = training.groups(kind)
        return max(len({pod[plan.ranks[rank].node] for rank in group}) for group in groups)

    assert widest("pipeline") == plan.expected["pipeline_spread"].value
    assert widest("data") == plan.expected["data_spread"].value
    assert plan.objective.value == pytest.approx(
        alpha * widest("data") + (1 - alpha) * widest("pipeline")
    )
    spreads = group_spreads(Fabric.of(cluster), training, used(plan))
    assert spreads["pod"]["data"]["widest"] == widest("data")


def test_the_same_input_gives_the_same_plan() -> None:
    cluster, training = tree(4, 2, 5), job(pipeline_parallel=4, data_parallel=6)
    first, second = plan_placement(cluster, training), plan_placement(cluster, training)
    assert first.ranks == second.ranks
    assert first.details == second.details


def test_relabelling_the_cluster_does_not_change_the_value() -> None:
    cluster, training = tree(3, 2, 5), job(pipeline_parallel=3, data_parallel=7)
    names = [node.name for node in cluster.nodes]
    draw = random.Random(3)
    new = dict(zip(names, draw.sample(names, len(names)), strict=True))
    data = cluster.model_dump(mode="json")
    for node in data["nodes"]:
        node["name"] = new[node["name"]]
    for link in data["links"]:
        link["a"] = new.get(link["a"], link["a"])
    draw.shuffle(data["nodes"])
    other = plan_placement(Cluster.model_validate(data), training)
    assert other.objective.value == plan_placement(cluster, training).objective.value


@pytest.mark.parametrize("seed", range(6))
def test_more_bandwidth_never_makes_it_worse(seed: int) -> None:
    """Faster cables change nothing; a further cable joins domains, and so can only help."""
    draw = random.Random(seed)
    cluster = tree(4, 2, draw.randint(2, 4))
    asked = job(pipeline_parallel=2, data_parallel=draw.randint(4, 7))
    before = plan_placement(cluster, asked)
    assert before.objective is not None
    data = cluster.model_dump(mode="json", exclude_unset=True)
    cable = draw.choice(data["links"])
    cable["bandwidth_bytes_per_s"] *= draw.choice((2, 8))
    faster = plan_placement(Cluster.model_validate(data), asked)
    assert faster.ranks == before.ranks
    one, other = draw.sample(range(8), 2)
    data["links"].append({"a": f"leaf{one}r0", "b": f"leaf{other}r0"} | LINK)
    more = plan_placement(Cluster.model_validate(data), asked)
    assert more.objective is not None
    assert more.objective.value <= before.objective.value


def test_an_allocation_with_a_drained_node_names_it() -> None:
    hosts = [f"n{i}" for i in range(16)]
    with pytest.raises(Infeasible, match=r"15 of 16 are free \('n5' drained\); .*, or free 1 more"):
        plan_placement(tree(2, 2, 4, n5="drained"), job(), mode="reorder", hosts=hosts)


def test_busy_and_drained_nodes_are_left_alone() -> None:
    cluster = tree(2, 2, 4, n0="busy", n9="drained")
    plan = plan_placement(
        cluster, job(data_parallel=12), states=states_of(busy=["n3"], drained=["n15"])
    )
    assert not {"n0", "n3", "n9", "n15"} & set(used(plan))
    assert len(used(plan)) == 12


def test_movable_nodes_are_taken_only_where_they_help() -> None:
    cluster = tree(2, 2, 4)
    states = states_of(movable=[f"n{i}" for i in range(4)])
    roomy = plan_placement(cluster, job(data_parallel=8), states=states)
    assert not {f"n{i}" for i in range(4)} & set(used(roomy))
    assert roomy.details["moves"] == []
    tight = plan_placement(cluster, job(data_parallel=14), states=states)
    assert len(tight.details["moves"]) == 2  # type: ignore[arg-type]
    assert any("moved" in w or "move" in w for w in tight.warnings)


def test_spares_stay_free_in_each_pod_in_use() -> None:
    plan = plan_placement(tree(3, 2, 4), job(data_parallel=14, spares_per_pod=1))
    spares = plan.details["spares"]
    assert isinstance(spares, dict)
    assert len(spares) == 2
    for names in spares.values():
        assert isinstance(names, list)
        assert len(names) == 1
        assert not set(map(str, names)) & set(used(plan))


def test_expert_groups_stay_in_a_pod() -> None:
    cluster = tree(4, 2, 3)
    plan = plan_placement(
        cluster, job(data_parallel=16, expert_parallel=4, pipeline_parallel=1, alpha=0.5)
    )
    tiers = plan.details["tiers"]
    assert isinstance(tiers, dict)
    assert tiers["pod"]["expert"]["widest"] == 1  # type: ignore[call-overload, index]


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"])
def test_only_groups_that_no_pod_holds_are_split(order: str) -> None:
    """Three pods of 7 hold three blocks of 4 whole; the fourth lies in two of them."""
    drained = states_of(drained=["n0", "n8", "n16"])
    experts: dict[str, Any] = {"tensor_parallel": 4, "expert_parallel": 8, "data_parallel": 16}
    if order == "tp-cp-ep-pp-dp":
        experts = {"tensor_parallel": 32, "data_parallel": 2, "gpus_per_node": 8}
    training = job(pipeline_parallel=2, order=order, **experts)
    plan = plan_placement(tree(3, 2, 4), training, states=drained)
    tiers: Any = plan.details["tiers"]
    kind = "expert" if "expert_parallel" in experts else "tensor"
    assert tiers["pod"][kind] == {"widest": 2, "mean": 1.25}
    assert plan.details["split_blocks"] == 1
    assert any("1 of 4 such blocks are split" in warning for warning in plan.warnings)
    # The bound is that of placements that split all groups: nothing more is proven.
    assert plan.objective.bound == pytest.approx(0.3 * 3 + 0.7)
    assert plan.objective.status == "feasible"
    assert plan.objective.value == pytest.approx(0.3 * 2 + 0.7 * 2)


def test_groups_stay_under_leaves_where_leaves_hold_them() -> None:
    """Leaves of 3 hold one group of 2 each; the third of a pod lies under both."""
    plan = plan_placement(tree(2, 2, 3), job(tensor_parallel=16, data_parallel=6))
    tiers: Any = plan.details["tiers"]
    assert tiers["pod"]["tensor"]["widest"] == 1
    assert tiers["leaf"]["tensor"]["mean"] == pytest.approx(4 / 3)


def test_tensor_groups_wider_than_a_node_are_placed_across_with_a_warning() -> None:
    cluster = tree(3, 2, 4)
    plan = plan_placement(cluster, job(tensor_parallel=16, data_parallel=4, pipeline_parallel=2))
    assert any("tensor_parallel is 16" in warning for warning in plan.warnings)
    tiers = plan.details["tiers"]
    assert tiers["pod"]["tensor"]["widest"] == 1  # type: ignore[call-overload, index]


def test_a_fixed_allocation_is_only_ordered() -> None:
    cluster = tree(3, 2, 4, n2="busy")
    hosts = ["n20", "n2", "n9", "n1", "n21", "n8"]
    plan = plan_placement(cluster, job(pipeline_parallel=2), mode="reorder", hosts=hosts)
    assert sorted(used(plan)) == sorted(hosts)
    assert plan.expected["pipeline_spread"].value == 1


def test_nodes_are_chosen_among_hosts_where_they_are_given() -> None:
    cluster = tree(3, 2, 4, n9="busy")
    hosts = [f"n{i}" for i in range(4, 20)]
    plan = plan_placement(cluster, job(data_parallel=8), hosts=hosts)
    assert set(used(plan)) <= set(hosts) - {"n9"}
    with pytest.raises(Infeasible, match="15 of 16 are free"):
        plan_placement(cluster, job(data_parallel=16), hosts=hosts)
    with pytest.raises(BadInput, match="no hosts to choose among"):
        plan_placement(cluster, job(data_parallel=8), hosts=[])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data_parallel": 30}, "needs 30 nodes .* 24 of 24 are free; data_parallel 24 would fit"),
        ({"data_parallel": 24, "spares_per_pod": 2}, "fewer than 2 spares"),
        ({"data_parallel": 8, "gpus_per_node": 16}, "0 of 24"),
        ({"data_parallel": 13, "pipeline_parallel": 2}, "needs 26 nodes"),
        ({"data_parallel": 30}, "24 would fit, or take a cluster with 6 more of them"),
        ({"data_parallel": 32, "expert_parallel": 16}, "data_parallel 16 would fit"),
        ({"data_parallel": 10**8}, "needs 100000000 nodes .* 24 of 24 are free"),
        ({"data_parallel": 10**8, "expert_parallel": 10**8}, "needs 100000000 nodes"),
    ],
)
def test_a_job_that_does_not_fit_is_told_what_would(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Infeasible, match=message):
        plan_placement(tree(3, 2, 4), job(**values))


def test_a_job_that_would_fit_if_others_ended_is_told_how_many_nodes_are_missing() -> None:
    with pytest.raises(
        Infeasible, match="22 of 24 are free; data_parallel 22 would fit, or free 1"
    ):
        plan_placement(tree(3, 2, 4, n0="busy", n1="busy"), job(data_parallel=23))


def test_a_prime_number_of_nodes_is_no_trouble() -> None:
    plan = plan_placement(tree(3, 2, 4), job(data_parallel=13))
    assert len(used(plan)) == 13
    with pytest.raises(BadInput, match="12 or 14 nodes"):
        plan_placement(
            tree(3, 2, 4),
            job(pipeline_parallel=2),
            mode="reorder",
            hosts=[f"n{i}" for i in range(13)],
        )


def test_a_disconnected_network_is_refused() -> None:
    data = tree(2, 1, 3).model_dump(mode="json")
    data["links"] = [link for link in data["links"] if link["b"] != "core"]
    with pytest.raises(BadInput, match="no links lead from 'n0' to 'n3'"):
        plan_placement(Cluster.model_validate(data), job(data_parallel=2))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_wrong_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(BadInput, match="alpha"):
        plan_placement(tree(2, 1, 3), job(data_parallel=2), alpha=alpha)


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (["n0", "n0"], "given twice"),
        (["n0", "nope"], "no node of the cluster"),
        ([], "needs the hosts"),
    ],
)
def test_wrong_hosts_are_refused(hosts: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        plan_placement(tree(2, 1, 3), job(), mode="reorder", hosts=hosts)


def test_unknown_nodes_tiers_and_states_are_refused() -> None:
    cluster = tree(2, 2, 3)
    with pytest.raises(BadInput, match="no node 'x'"):
        plan_placement(cluster, job(data_parallel=2), states={"x": "busy"})
    with pytest.raises(BadInput, match="no tier 'rack'"):
        plan_placement(cluster, job(data_parallel=2), tier="rack")
    with pytest.raises(BadInput, match="two states"):
        states_of(busy=["n0"], drained=["n0"])
    with pytest.raises(BadInput, match="has the state 'odd'"):
        plan_placement(tree(2, 2, 3, n1="odd"), job(data_parallel=2))


def test_a_job_without_replicas_needs_a_fixed_allocation() -> None:
    with pytest.raises(BadInput, match="data_parallel"):
        plan_placement(tree(2, 1, 3), job())


def test_leaves_inside_a_pod_are_laid_out_too() -> None:
    """One pod of four leaves holds everything; pipelines stay under one leaf."""
    cluster = tree(2, 4, 4)
    plan = plan_placement(cluster, job(pipeline_parallel=4, data_parallel=4), alpha=0.2)
    tiers = plan.details["tiers"]
    assert isinstance(tiers, dict)
    assert tiers["pod"]["data"]["widest"] == 1  # type: ignore[call-overload, index]
    assert tiers["leaf"]["pipeline"]["widest"] == 1  # type: ignore[call-overload, index]
    turned = plan_placement(cluster, job(pipeline_parallel=4, data_parallel=4), alpha=0.8)
    tiers = turned.details["tiers"]
    assert isinstance(tiers, dict)
    assert tiers["leaf"]["data"]["widest"] == 1  # type: ignore[call-overload, index]


def test_interleaved_stages_cross_back_to_the_first() -> None:
    fabric = Fabric.of(tree(2, 1, 2))
    order = ["n0", "n2", "n1", "n3"]  # node rank = stage, so pods alternate
    plain = job(data_parallel=1, pipeline_parallel=4)
    interleaved = job(data_parallel=1, pipeline_parallel=4, virtual_stages=2)
    for each, crossings in ((plain, 3), (interleaved, 4)):
        found = group_spreads(fabric, each, order)[fabric.tiers[0]]["pipeline"]
        assert (found["widest"], found["crossings"]) == (2, crossings)
