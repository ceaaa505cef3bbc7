"""Closed forms against Monte Carlo, enumeration and published tables."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trimtab.branches.order_statistics import (
    LengthDistribution,
    best_of_accuracy,
    group_cost,
    majority_accuracy,
    within_group_auroc,
)
from trimtab.core.errors import BadInput

FAMILIES = {
    "exponential": stats.expon(),
    "lognormal .62": stats.lognorm(0.62, scale=np.exp(-(0.62**2) / 2)),
    "lognormal 1.0": stats.lognorm(1.0, scale=np.exp(-0.5)),
    "normal .2": stats.norm(1.0, 0.2),
}
TABLE = {
    "exponential": [(2.08, 4.00), (0.95, 4.00), (0.634, 4.00), (0.385, 3.99), (0.278, 4.00)],
    "lognormal .62": [(1.73, 4.00), (0.98, 4.70), (0.778, 5.40), (0.608, 6.74), (0.526, 7.97)],
    "lognormal 1.0": [(2.21, 4.00), (0.84, 3.66), (0.573, 3.75), (0.381, 4.08), (0.300, 4.44)],
    "normal .2": [(1.21, 4.00), (1.04, 5.70), (0.970, 7.30), (0.893, 10.3), (0.847, 13.2)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_table_of_latency_and_tokens(family: str) -> None:
    lengths = LengthDistribution.of_quantiles(FAMILIES[family].ppf)
    for n, (latency, tokens) in zip((4, 6, 8, 12, 16), TABLE[family], strict=True):
        cost = group_cost(lengths, n, 4)
        assert cost.latency_tokens == pytest.approx(latency, rel=0.012)
        assert cost.tokens == pytest.approx(tokens, rel=0.01)


def test_exponential_branches_in_closed_form() -> None:
    lengths = LengthDistribution.of_quantiles(stats.expon().ppf)
    for n, area in ((4, 4.00), (8, 1.46), (16, 0.67)):
        cost = group_cost(lengths, n, 4)
        harmonic = sum(1 / k for k in range(n - 3, n + 1))
        assert cost.latency_tokens == pytest.approx(harmonic, rel=1e-5)
        assert cost.tokens == pytest.approx(4.0, rel=1e-5)
        assert cost.kv_area == pytest.approx(area, rel=0.01)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 5), st.data())
def test_empirical_lengths_equal_all_draws_enumerated(
    values: list[int], n: int, data: st.DataObject
) -> None:
    m = data.draw(st.integers(1, n))
    draws = np.sort(np.array(list(product(values, repeat=n)), dtype=float), axis=1)
    cut = np.minimum(draws, draws[:, m - 1 : m])
    cost = group_cost(LengthDistribution.of_samples(values), n, m)
    assert cost.latency_tokens == pytest.approx(draws[:, m - 1].mean())
    assert cost.tokens == pytest.approx(cut.sum(axis=1).mean())
    assert cost.kv_area == pytest.approx((cut**2).sum(axis=1).mean() / 2)


@pytest.mark.parametrize(("n", "m"), [(8, 4), (8, 8), (16, 3), (5, 1)])
def test_empirical_lengths_equal_monte_carlo(n: int, m: int) -> None:
    rng = np.random.default_rng(5)
    trace = rng.lognormal(8, 0.7, 300).round()
    draws = np.sort(rng.choice(trace, (40_000, n)), axis=1)
    cut = np.minimum(draws, draws[:, m - 1 : m])
    cost = group_cost(LengthDistribution.of_samples(trace), n, m)
    assert cost.latency_tokens == pytest.approx(draws[:, m - 1].mean(), rel=0.01)
    assert cost.tokens == pytest.approx(cut.sum(axis=1).mean(), rel=0.01)
    assert cost.kv_area == pytest.approx((cut**2).sum(axis=1).mean() / 2, rel=0.02)


def test_the_published_table_of_selection() -> None:
    for p, auroc, expected in (
        (0.5, 0.7, (0.500, 0.600, 0.681, 0.745)),
        (0.5, 0.85, (0.500, 0.673, 0.814, 0.899)),
        (0.3, 0.7, (0.30, 0.384, 0.464, 0.538)),
    ):
        found = [best_of_accuracy(p, auroc, m) for m in (1, 2, 4, 8)]
        assert found == pytest.approx(expected, abs=0.004)


@pytest.mark.parametrize("auroc", [0.3, 0.5, 0.66, 0.84, 0.99])
@pytest.mark.parametrize("p", [0.0, 0.2, 0.7, 1.0])
def test_selection_equals_monte_carlo_and_the_closed_form_of_two(p: float, auroc: float) -> None:
    rng = np.random.default_rng(1)
    right = rng.random((60_000, 6)) < p
    scores = rng.normal(size=right.shape) + right * np.sqrt(2) * stats.norm.ppf(auroc)
    best = right[np.arange(len(right)), scores.argmax(axis=1)].mean()
    assert best_of_accuracy(p, auroc, 6) == pytest.approx(best, abs=0.008)
    assert best_of_accuracy(p, auroc, 2) == pytest.approx(p * p + 2 * p * (1 - p) * auroc)
    assert best_of_accuracy(p, auroc, 1) == pytest.approx(p)


def test_a_majority_of_three() -> None:
    assert majority_accuracy(0.6, 3) == pytest.approx(0.6**3 + 3 * 0.6**2 * 0.4)
    assert majority_accuracy(0.6, 2) == pytest.approx(0.36)


def test_auroc_compares_within_a_request_only() -> None:
    easy = ([0.9, 0.8], [True, False])
    hard = ([0.1, 0.2, 0.1], [True, False, False])
    assert within_group_auroc([easy]) == 1.0
    assert within_group_auroc([easy, hard]) == pytest.approx((1 + 0 + 0.5) / 3)
    assert within_group_auroc([([0.4], [True])]) is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d: d.order_statistic(5, 4), "M is 5 and N is 4"),
        (lambda d: group_cost(d, 4, 0), "M is 0"),
        (lambda d: LengthDistribution.of_samples([]), "positive"),
        (lambda d: LengthDistribution.of_samples([3, float("nan")]), "positive"),
        (lambda d: best_of_accuracy(1.2, 0.6, 3), "accuracy is 1.2"),
        (lambda d: best_of_accuracy(0.5, 1.0, 3), "AUROC is 1.0"),
        (lambda d: majority_accuracy(0.5, 0), "N is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(call: object, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        call(LengthDistribution.of_samples([1, 2, 3]))  # type: ignore[operator]
