"""Bytes between domains, against a walk over single ranks."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.placement.fabric import Fabric, Place
from trimtab.placement.job import TrainingJob
from trimtab.placement.traffic import communication, flows, traffic
from trimtab.placement.volumes import Volumes

ALL = Volumes(tensor=1, context=10, expert=100, data=1000, expert_data=10_000, pipeline=100_000)


def job(**values: Any) -> TrainingJob:
    return TrainingJob(**{"gpus_per_node": 4, "volumes": ALL} | values)


def fabric_of(nodes: int, pods: int) -> Fabric:
    """Neighbouring names lie in different pods."""
    places = [
        Place(f"n{i:03d}", (f"pod{i % pods}", f"leaf{i % pods}.{i % 2}"), 4) for i in range(nodes)
    ]
    return Fabric(("pod", "leaf"), tuple(places))


Place3 = tuple[int, int, int]
"""Tensor rank, replica (context ranks of replicas, context fastest) and stage."""


def rank_of(training: TrainingJob, at: Place3) -> int:
    tensor, (replica, context), stage = at[0], divmod(at[1], training.context_parallel), at[2]
    outer = replica * training.pipeline_parallel + stage
    if training.order == "tp-cp-ep-dp-pp":
        outer = stage * training.replicas + replica
    return (outer * training.context_parallel + context) * training.tensor_parallel + tensor


def rings(training: TrainingJob, at: Place3) -> Iterator[tuple[Place3, float]]:
    """The next rank in each ring that a rank is in, with what it gets."""
    t, c, e = training.tensor_parallel, training.context_parallel, training.expert_parallel
    tensor, replica, stage = at
    replicas = c * training.replicas
    if t > 1:
        yield ((tensor + 1) % t, replica, stage), ALL.tensor
    if c > 1:
        yield (tensor, replica // c * c + (replica + 1) % c, stage), ALL.context
    if replicas > 1:
        yield (tensor, (replica + 1) % replicas, stage), ALL.data
    if replicas > e:
        yield (tensor, (replica + e) % replicas, stage), ALL.expert_data


def single(training: TrainingJob, at: Place3) -> Iterator[tuple[Place3, float]]:
    """The experts and the stages that a rank sends to, with what they get."""
    p, e, chunks = (
        training.pipeline_parallel,
        training.expert_parallel,
        training.virtual_stages,
    )
    tensor, replica, stage = at
    first = replica // e * e
    for other in range(first, first + e):
        if other != replica:
            yield (tensor, other, stage), ALL.expert / (e - 1)
    for chunk in range(chunks):
        for step in (1, -1):
            # The last chunk has nobody to send to, and neither has the first one backward.
            to = chunk * p + stage + step
            if p > 1 and 0 <= to < p * chunks:
                yield (tensor, replica, to % p), ALL.pipeline / 2 / chunks


def naive(training: TrainingJob, domain: list[str]) -> dict[tuple[str, str], float]:
    """Rank after rank, by the coordinates that its number means."""
    sent: dict[tuple[str, str], float] = defaultdict(float)
    replicas = training.context_parallel * training.replicas
    every = itertools.product(
        range(training.tensor_parallel), range(replicas), range(training.pipeline_parallel)
    )
    for at in every:
        for to, size in (*rings(training, at), *single(training, at)):
            sent[domain[rank_of(training, at)], domain[rank_of(training, to)]] += size
    return sent


@settings(max_examples=40, deadline=None)
@given(
    degrees=st.fixed_dictionaries(
        {
            "tensor_parallel": st.sampled_from([1, 2, 4, 8]),
            "context_parallel": st.integers(1, 2),
            "data_parallel": st.integers(1, 6),
            "pipeline_parallel": st.integers(1, 3),
            "expert_parallel": st.sampled_from([1, 2, 3, 4]),
            "virtual_stages": st.integers(1, 3),
        }
    ),
    order=st.sampled_from(["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"]),
    pods=st.integers(1, 4),
    draw=st.randoms(use_true_random=False),
)
def test_each_ranks_bytes_reach_the_right_domain(
    degrees: dict[str, int], order: str, pods: int, draw: Any
) -> None:
    try:
        training = job(order=order, **degrees)
    except ValueError:
        return
    nodes = training.world_size // training.ranks_per_node
    fabric = fabric_of(nodes, pods)
    order_of = [place.name for place in fabric.places]
    draw.shuffle(order_of)
    found = traffic(fabric, training, order_of, 0, ALL)
    path = {place.name: place.path for place in fabric.places}
    domain = [path[node][0] for node in order_of for _ in range(training.ranks_per_node)]
    expected = naive(training, domain)
    for a, row in zip(found.domains, found.between, strict=True):
        for b, size in zip(found.domains, row, strict=True):
            assert size == pytest.approx(expected.get((a, b), 0.0))
    outside = sum(size for (a, b), size in expected.items() if a != b)
    assert sum(found.crossing.values()) == pytest.approx(outside)


def test_each_kind_crosses_by_its_own_groups() -> None:
    training = job(tensor_parallel=4, data_parallel=4, pipeline_parallel=2)
    fabric = fabric_of(8, 2)
    # Stages in different pods: all that goes between stages crosses, and nothing else does.
    order = ["n000", "n002", "n004", "n006", "n001", "n003", "n005", "n007"]
    crossing = traffic(fabric, training, order, 0, ALL).crossing
    assert crossing["pipeline"] == 32 * ALL.pipeline / 2
    assert {kind for kind, size in crossing.items() if size} == {"pipeline"}


def test_what_ranks_send_is_what_their_volumes_say() -> None:
    """In the middle of a pipeline; the stages at its ends have one neighbour less."""
    training = job(tensor_parallel=4, data_parallel=4, pipeline_parallel=3, expert_parallel=2)
    sent: dict[str, float] = defaultdict(float)
    for flow in flows(training, ALL):
        sent[flow.kind] += flow.size_bytes * int((flow.source == 4 * 4 + 1).sum())
    assert sent == {k: v for k, v in ALL.model_dump().items() if k != "context"}


def test_a_plan_tells_volumes_and_what_crosses_before_and_after() -> None:
    training = job(tensor_parallel=4, data_parallel=4, pipeline_parallel=2, alpha=0.3)
    fabric = fabric_of(8, 2)
    order = ["n000", "n002", "n004", "n006", "n001", "n003", "n005", "n007"]
    facts = communication(fabric, training, order, 0.3, 0)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["volumes"] == ALL.model_dump()
    assert facts["alpha_from"] == "given"
    # By name neighbours in a column lie in different pods, and stages of a row in one.
    assert facts["crossing"]["pod"]["data"] == {"before": 32 * ALL.data, "after": 0.0}
    assert facts["crossing"]["pod"]["pipeline"] == {"before": 0.0, "after": 16 * ALL.pipeline}
    assert facts["between"]["before"]["pod0"] == {"pod1": 16 * (ALL.data + ALL.expert_data)}
    assert facts["between"]["after"]["pod0"] == {"pod1": 8 * ALL.pipeline}
    assert set(facts["crossing"]) == {"pod", "leaf"}


def test_a_job_without_a_model_has_no_bytes() -> None:
    training = TrainingJob(tensor_parallel=8, data_parallel=2)
    facts = communication(fabric_of(2, 2), training, ["n000", "n001"], 0.3, 0)
    assert facts["volumes"] is None
    assert facts["crossing"] == facts["between"] == facts["exposure"] == {}
    assert "no model" in facts["alpha_from"]
