"""GenModel's constants from runs: exact ones come back, noisy ones lie in their intervals."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.cluster import Cluster, Link, Node
from trimtab.core.collectives import Layout, NetworkTree
from trimtab.core.collectives.combine import ring, staged
from trimtab.core.cost import (
    Constants,
    GenModel,
    PlanEvaluator,
    Run,
    fit_model,
    fit_plain_model,
    prediction_error,
)
from trimtab.core.errors import BadInput
from trimtab.hosts.torch.network_profile import NO_LATENCY, fit_summary

TRUE = GenModel(1e-3, 8e-9, 1e-10, 3e-10, 6e-10, 3)
GROUPS = [(2,), (3,), (4,), (5,), (6,), (7,), (8,), (2, 2), (2, 3), (4, 2), (2, 2, 2)]
SIZES = [2**16, 2**20, 2**22]


def runs_of(model: GenModel, noise: float = 0.0, seed: int = 0, sizes=SIZES) -> list[Run]:
    random = np.random.default_rng(seed)
    shapes = [("staged", g) for g in GROUPS]
    shapes += [("ring", (n,)) for n in (4, 8)] + [("sum", (k,)) for k in range(2, 9)]
    found = []
    for (algorithm, groups), size in product(shapes, sizes):
        run = Run(algorithm=algorithm, groups=groups, payload_bytes=size, seconds=(1.0,))
        seconds = model.seconds(run.collective, size) * (1 + noise * random.standard_normal(5))
        found.append(
            run.model_copy(update={"seconds": tuple(np.maximum(np.abs(seconds), 1e-9).tolist())})
        )
    return found


@settings(max_examples=20)
@given(
    st.floats(1e-5, 1e-2),
    st.floats(1e-10, 1e-7),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.floats(0.02, 1),
    st.integers(2, 7),
    st.floats(0, 1),
)
def test_exact_times_give_the_constants_back(
    alpha, beta, gamma, delta, epsilon, threshold, message
) -> None:
    true = GenModel(
        alpha, beta, gamma * beta, delta * beta, epsilon * beta, threshold, message * alpha
    )
    fit = fit_model(runs_of(true))
    assert fit.incast_threshold == threshold
    found = fit.model
    assert found.alpha_s == pytest.approx(alpha, rel=1e-5)
    assert found.message_s == pytest.approx(message * alpha, rel=1e-5, abs=1e-6 * alpha)
    for name in ("beta_s_per_byte", "gamma_s_per_byte", "delta_s_per_byte", "epsilon_s_per_byte"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-5)
    assert fit.error < fit.plain_error


def test_intervals_hold_the_truth_and_shrink_with_the_noise() -> None:
    held, widths = 0, {}
    for noise in (0.02, 0.1):
        for seed in range(10):
            fit = fit_model(runs_of(TRUE, noise, seed))
            interval = fit.beta_s_per_byte
            held += interval.low <= TRUE.beta_s_per_byte <= interval.high
            widths.setdefault(noise, []).append(interval.high - interval.low)
            assert abs(fit.incast_threshold - TRUE.incast_threshold) <= (noise > 0.05)
            assert interval.low <= interval.value <= interval.high
    assert held >= 15
    assert np.median(widths[0.02]) < 0.5 * np.median(widths[0.1])


def test_sizes_that_were_left_out_are_predicted_better_than_without_incast_and_memory() -> None:
    fit, plain = fit_model(runs_of(TRUE, 0.03)), fit_plain_model(runs_of(TRUE, 0.03))
    unseen = [r for r in runs_of(TRUE, sizes=[2**18, 2**21]) if r.algorithm == "staged"]
    assert prediction_error(fit.model, unseen) < 0.02
    assert prediction_error(plain, unseen) > 3 * prediction_error(fit.model, unseen)
    assert (plain.gamma_s_per_byte, plain.delta_s_per_byte, plain.epsilon_s_per_byte) == (0, 0, 0)
    assert plain.message_s == 0


def test_nothing_is_fitted_below_zero() -> None:
    free = GenModel(1e-3, 8e-9)
    fit = fit_model(runs_of(free, 0.05))
    for name in ("gamma_s_per_byte", "delta_s_per_byte", "epsilon_s_per_byte"):
        assert getattr(fit, name).low >= 0
        assert getattr(fit, name).value < 0.1 * free.beta_s_per_byte


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda r: r.algorithm == "sum", "0 collectives"),
        (lambda r: r.payload_bytes == SIZES[0], "one size"),
        (lambda r: r.ranks == 4, "one number of ranks"),
    ],
)
def test_runs_that_show_too_little_are_refused(keep, message) -> None:
    runs = [run for run in runs_of(TRUE) if keep(run)]
    for fit in (fit_model, fit_plain_model):
        with pytest.raises(BadInput, match=message):
            fit(runs)


def star(count: int, bandwidth: float, latency_s: float) -> NetworkTree:
    nodes = tuple(Node(name=f"h{i}", device="cpu") for i in range(count))
    links = tuple(
        Link(a=n.name, b="s", bandwidth_bytes_per_s=bandwidth, latency_s=latency_s) for n in nodes
    )
    return NetworkTree.of_cluster(Cluster(nodes=nodes, switches=("s",), links=links))


def test_constants_of_a_fit_cost_plans_as_the_fitted_model_does() -> None:
    """On the network that the runs were made on, whatever its bandwidths were said to be."""
    fit = fit_model(runs_of(TRUE))
    tree = star(8, 2e8, 1e-5)
    constants = Constants.of_fit(fit, tree)
    assert constants.beta_ratio == pytest.approx(8e-9 * 2e8)
    evaluator = PlanEvaluator(tree, constants)
    parties = [Layout.whole(rank) for rank in range(8)]
    for groups in ((8,), (4, 2), (2, 2, 2)):
        run = Run(algorithm="staged", groups=groups, payload_bytes=2**20, seconds=(1.0,))
        seconds = evaluator.cost(staged(parties, groups)[0]).seconds(2**20)
        assert seconds == pytest.approx(TRUE.seconds(run.collective, 2**20), rel=1e-4)
    around = Run(algorithm="ring", groups=(8,), payload_bytes=2**20, seconds=(1.0,))
    seconds = evaluator.cost([ring(parties)[0]]).seconds(2**20)
    assert seconds == pytest.approx(TRUE.seconds(around.collective, 2**20), rel=1e-4)


def test_a_fit_without_bandwidth_gives_no_constants() -> None:
    fit = fit_model(runs_of(GenModel(1e-2, 0.0)))
    with pytest.raises(BadInput, match="no bandwidth"):
        Constants.of_fit(fit, star(8, 1e9, 0.0))


@pytest.mark.parametrize(("alpha", "message"), [(0.0, 0.0), (1e-3, 0.0), (0.0, 1e-4)])
def test_runs_that_show_no_latency_say_so(alpha: float, message: float) -> None:
    fit = fit_model(runs_of(GenModel(alpha, 8e-9, 0.0, 0.0, 0.0, 3, message)))
    told = fit_summary(Constants.of_fit(fit, star(8, 2e8, 0.0)))
    assert (NO_LATENCY in told) == (alpha + message == 0)


def test_a_ring_of_two_groups_is_none() -> None:
    with pytest.raises(ValueError, match="ring has 2 groups"):
        Run(algorithm="ring", groups=(2, 4), payload_bytes=1, seconds=(1.0,))
