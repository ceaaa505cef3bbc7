"""The real benchmark's orders and cases, without running it."""

from __future__ import annotations

import pytest

from trimtab.core.benchmark import Options
from trimtab.core.errors import TrimtabError
from trimtab.hosts.testbed.pipeline_job import Task, Timing
from trimtab.placement import real_bench


def leaf_of(network) -> dict[str, str]:
    return {link.a: link.b for link in network.links if link.b != "core"}


@pytest.mark.parametrize("seed", range(5))
def test_the_plan_keeps_the_groups_that_send_most_below_one_leaf(seed: int) -> None:
    network = real_bench.scattered(seed)
    order, leaf = real_bench.planned_order(network), leaf_of(network)
    assert sorted(order) == list(real_bench.by_name(network))
    stages = order[:4], order[4:]
    assert [len({leaf[host] for host in stage}) for stage in stages] == [1, 1]


def test_orders_are_seeded_and_whole() -> None:
    network = real_bench.scattered(3)
    orders = real_bench.random_orders(network, 6, Options(seed=3))
    assert orders == real_bench.random_orders(network, 6, Options(seed=3))
    assert {tuple(sorted(order)) for order in orders} == {real_bench.by_name(network)}
    assert len(set(orders)) == 6


def test_bytes_that_a_rank_sends() -> None:
    task = Task(orders=(tuple("abcdefgh"),), pipeline=2, width=10, micro_batches=3)
    assert task.replicas == 4
    assert task.gradient_bytes == 2 * 400 * 3 // 4
    assert task.activation_bytes == 4 * 16 * 10 * 3


def test_cases_compare_within_a_round() -> None:
    rounds = [[1.0, 2.0, 2.0, 4.0], [2.0, 2.0, 3.0, 5.0]]
    cases = {case.baseline: case for case in real_bench._cases(rounds, "2 random orders")}
    assert set(cases) == {
        "mean of 2 random orders",
        "best of 2 random orders",
        "hostname-order",
    }
    assert cases["mean of 2 random orders"].ratio_low == 2
    assert cases["mean of 2 random orders"].ratio_high == 3
    assert cases["best of 2 random orders"].ratio == pytest.approx(1.75)
    assert cases["hostname-order"].ratio_low == 1


def test_an_order_that_computes_something_else() -> None:
    real_bench._check_losses([Timing(step_s=1, loss=2.0), Timing(step_s=2, loss=2.00001)])
    with pytest.raises(TrimtabError, match=r"loss is 2\.1 in one order of hosts and 2\.0 in"):
        real_bench._check_losses([Timing(step_s=1, loss=2.0), Timing(step_s=2, loss=2.1)])


def test_a_machine_without_namespaces_has_no_real_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_bench, "obstacle", lambda: "no kernel")
    said: list[str] = []
    assert real_bench.real_cases(Options(), lambda message, done=None: said.append(message)) == []
    assert said == ["real hosts are left out: no kernel"]
