"""The comparison of a live job with its plan, with made-up ranks and layouts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.cluster import Cluster, Link, Node
from trimtab.core.errors import BadInput
from trimtab.core.plan import Plan
from trimtab.hosts.torch.job_check import LiveRank
from trimtab.placement.job import TrainingJob
from trimtab.placement.job_check import compare, groups_of, require_ascending
from trimtab.placement.planner import plan_placement

HOSTS = ["a", "b", "c", "d"]


def network() -> Cluster:
    links = [
        *(
            Link(a=host, b=f"leaf{at % 2}", bandwidth_bytes_per_s=1e9)
            for at, host in enumerate(HOSTS)
        ),
        Link(a="leaf0", b="core", bandwidth_bytes_per_s=1e9),
        Link(a="leaf1", b="core", bandwidth_bytes_per_s=1e9),
    ]
    nodes = tuple(Node(name=host, device="cpu", count=2) for host in HOSTS)
    return Cluster(nodes=nodes, switches=("leaf0", "leaf1", "core"), links=tuple(links))


JOB = TrainingJob(
    tensor_parallel=2, pipeline_parallel=2, data_parallel=2, gpus_per_node=2, alpha=0.9
)
PLAN = plan_placement(network(), JOB)
GROUPS = {
    "model": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "data": [[0, 2], [1, 3], [4, 6], [5, 7]],
    "pipe": [[0, 4], [1, 5], [2, 6], [3, 7]],
}


def live(nodes: Sequence[str]) -> list[LiveRank]:
    """Two ranks on each node, in order."""
    return [
        LiveRank((f"{node}.domain", f"10.0.0.{ord(node)}"), d) for node in nodes for d in (0, 1)
    ]


def planned_nodes(plan: Plan = PLAN) -> list[str]:
    return [slot.node for slot in plan.ranks[::2]]


def test_a_job_that_lies_as_planned() -> None:
    found = compare(PLAN, live(planned_nodes()), [GROUPS])
    assert found.differences == ()
    assert found.spreads == found.planned_spreads
    assert found.spreads["leaf"]["data"] == 1


@given(st.permutations(HOSTS))
def test_every_other_order_is_told(nodes: list[str]) -> None:
    found = compare(PLAN, live(nodes))
    moved = sum(a != b for a, b in zip(nodes, planned_nodes(), strict=True))
    assert bool(found.misplaced) == bool(moved)
    if moved:
        assert found.misplaced[0].startswith(f"{2 * moved} of 8 ranks run elsewhere than planned")
    leaves = [HOSTS.index(node) % 2 for node in nodes]
    assert found.spreads["leaf"]["data"] == 1 + (leaves[0] != leaves[1])
    assert bool(found.widened) == (leaves[0] != leaves[1])


def test_the_sentences() -> None:
    first, second, third, fourth = planned_nodes()
    found = compare(PLAN, live([first, third, second, fourth]))
    assert found.differences == (
        f"4 of 8 ranks run elsewhere than planned, the first of them rank 2 on {third}.domain/0"
        f" instead of {second}/0",
        "the widest data group touches 2 of the tier leaf, where the plan has 1",
    )


def test_swapped_devices_and_a_host_the_plan_does_not_know() -> None:
    ranks = live(planned_nodes())
    ranks[0], ranks[1] = ranks[1], ranks[0]
    assert "2 of 8 ranks" in compare(PLAN, ranks).misplaced[0]
    stranger = compare(PLAN, live([*planned_nodes()[:3], "z"]))
    assert "rank 6 on z.domain/0" in stranger.misplaced[0]


def test_another_number_of_ranks() -> None:
    found = compare(PLAN, live(planned_nodes())[:6])
    assert found.differences == ("the job has 6 ranks, where the plan has 8",)


def test_a_plan_that_knows_hosts_by_address() -> None:
    slots = tuple(
        slot.model_copy(update={"node": f"10.0.0.{ord(slot.node)}"}) for slot in PLAN.ranks
    )
    assert compare(PLAN.model_copy(update={"ranks": slots}), live(planned_nodes())).misplaced == ()


def test_groups_that_the_framework_makes_otherwise() -> None:
    tensor_outside = {"tp": [[0, 4], [1, 5], [2, 6], [3, 7]], "other": [[7, 1]]}
    assert compare(PLAN, live(planned_nodes()), [tensor_outside]).regrouped == (
        "the framework's tp group [0, 4] is no tensor group of the plan, such as [0, 1]",
    )
    parts = {"dp_replicate": [[0], [1]], "dp_shard": [[0, 2], [1, 3]]}
    assert compare(PLAN, live(planned_nodes()), [parts]).regrouped == ()
    assert compare(PLAN, live(planned_nodes()), [{"dp": [[0], [1]]}]).regrouped != ()


def megatron(tp: int, cp: int, dp: int, pp: int, order: str, kind: str) -> list[list[int]]:
    """Megatron's groups: the ranks that agree in all dimensions but one."""
    sizes = {"tp": tp, "cp": cp, "dp": dp, "pp": pp}
    names = [name for name in order.split("-") if name in sizes]
    groups: dict[tuple[int, ...], list[int]] = {}
    world = itertools.product(*(range(sizes[name]) for name in reversed(names)))
    for rank, reversed_at in enumerate(world):
        at = dict(zip(reversed(names), reversed_at, strict=True))
        groups.setdefault(tuple(at[name] for name in names if name != kind), []).append(rank)
    return sorted(groups.values())


degrees = st.integers(1, 3)


@given(degrees, degrees, degrees, degrees, st.sampled_from(["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"]))
def test_megatrons_groups_are_the_jobs(tp: int, cp: int, dp: int, pp: int, order: str) -> None:
    job = TrainingJob.model_validate(
        {
            "tensor_parallel": tp,
            "context_parallel": cp,
            "data_parallel": dp,
            "pipeline_parallel": pp,
            "gpus_per_node": tp * cp * dp * pp,
            "order": order,
        }
    )
    for kind, name in (("tensor", "tp"), ("context", "cp"), ("data", "dp"), ("pipeline", "pp")):
        assert sorted(job.groups(kind)) == megatron(tp, cp, dp, pp, order, name)  # type: ignore[arg-type]


@given(st.permutations(range(4)))
def test_only_ascending_groups_pass(ranks: list[int]) -> None:
    if ranks == sorted(ranks):
        require_ascending({"data": [ranks]})
    else:
        with pytest.raises(BadInput, match="is not in ascending order, which would mix up tensors"):
            require_ascending({"pipe": [[0, 1]], "data": [ranks]})


def test_a_repeated_rank_does_not_pass() -> None:
    with pytest.raises(BadInput):
        require_ascending({"data": [[1, 1]]})


def topology() -> SimpleNamespace:
    return SimpleNamespace(
        get_axis_comm_lists=lambda axis: {"pipe": [[0, 1]], "data": []}[axis],
        get_axis_names=lambda: ["pipe", "data"],
        world_size=lambda: 2,
    )


def test_layouts_that_are_known() -> None:
    groups = {"pipe": [[0, 1]], "data": [[0], [1]]}
    grid = SimpleNamespace(topology=topology, get_pipe_parallel_group=None)
    for layout in (topology(), grid, SimpleNamespace(grid=grid), groups):
        assert groups_of(layout) == groups
    with pytest.raises(BadInput, match="a list is no layout of groups; give a DeviceMesh"):
        groups_of([[0, 1]])


def test_a_plan_of_another_kind() -> None:
    with pytest.raises(BadInput, match="this is a fleet plan"):
        compare(PLAN.model_copy(update={"planner": "fleet"}), live(planned_nodes()))
