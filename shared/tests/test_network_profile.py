"""The parts of the network profile that need no network: who meets whom, and what times show."""

from __future__ import annotations

import os
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.errors import BadInput
from trimtab.core.topology.measured import Measurement
from trimtab.hosts.host_order import own_host
from trimtab.hosts.torch.network_profile import (
    bandwidth_bytes_per_s,
    main,
    nearest_ranks,
    parse_sizes,
    rounds,
)


@given(st.integers(0, 40))
def test_each_pair_meets_once_in_rounds_of_disjoint_pairs(count: int) -> None:
    played = rounds(count)
    assert sorted(pair for pairs in played for pair in pairs) == list(combinations(range(count), 2))
    for pairs in played:
        players = [player for pair in pairs for player in pair]
        assert len(set(players)) == len(players)
    # With fewer rounds some player would have to be in two pairs at once.
    assert len(played) == max(0, count - 1 + count % 2)


@given(
    st.floats(1e6, 1e11),
    st.floats(0, 5),
    st.lists(st.integers(1, 2**10), min_size=2, max_size=5, unique=True),
)
def test_what_every_message_costs_cancels_out(rate: float, share: float, kib: list[int]) -> None:
    sizes = [1024 * number for number in kib]
    fixed_s = share * max(sizes) / rate
    seconds = {size: fixed_s + size / rate for size in sizes}
    assert bandwidth_bytes_per_s(seconds, fixed_s) == pytest.approx(rate, rel=1e-3)


def test_one_slow_message_does_not_decide() -> None:
    seconds = {size * 10**6: 0.001 + size * 0.01 for size in range(1, 6)}
    seconds[3 * 10**6] *= 4
    assert bandwidth_bytes_per_s(seconds, 0.001) == pytest.approx(1e8, rel=0.05)


def test_noise_and_a_single_size_still_give_a_bandwidth() -> None:
    assert bandwidth_bytes_per_s({10**6: 0.012}, 0.002) == pytest.approx(1e8)
    assert bandwidth_bytes_per_s({10**6: 0.012, 10**7: 0.011}, 0.001) == pytest.approx(1e9)
    # Times that hardly differ would show any bandwidth; the longest message bounds it.
    assert bandwidth_bytes_per_s({10**6: 0.010, 10**7: 0.0100001}, 0.0) == pytest.approx(
        1e9, rel=1e-3
    )


def test_sizes() -> None:
    assert parse_sizes("1MiB, 256KiB,1MiB") == (2**18, 2**20)
    for text in ("", "big", "0B", "1PiB", "-1B"):
        with pytest.raises(BadInput, match="--sizes has"):
            parse_sizes(text)


def measured(domains: list[int], names: list[str]) -> Measurement:
    """Hosts of one domain are ten times nearer than those of two."""
    count = range(len(domains))
    rates = tuple(
        tuple(None if i == j else 1e10 if domains[i] == domains[j] else 1e9 for j in count)
        for i in count
    )
    return Measurement(hosts=tuple(names), bandwidth_bytes_per_s=rates)


@pytest.mark.parametrize(
    ("domains", "ranks"),
    [
        ([0, 1, 0, 1, 0], [0, 4, 8]),
        ([0, 0, 1, 1], [0, 2, 4, 6]),  # two are too few, so that all take part
        ([0, 0], [0, 2]),
    ],
)
def test_constants_are_fitted_below_the_lowest_switch_with_enough_hosts(domains, ranks) -> None:
    names = [f"h{i}" for i in range(len(domains))]
    players = {2 * i: name for i, name in enumerate(names)}
    assert nearest_ranks(measured(domains, names), players) == ranks


def test_processes_of_one_machine_share_what_there_is() -> None:
    """Tiers seen between them are noise."""
    names = [f"{own_host(os.environ)}-{rank}" for rank in range(5)]
    assert nearest_ranks(measured([0, 1, 0, 1, 0], names), dict(enumerate(names))) == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_outside_of_a_job_it_says_so(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    monkeypatch.delenv("RANK", raising=False)
    assert main(["--out", str(tmp_path / "m.json"), "--backend", "gloo"]) == 2
    assert "RANK is not set, so this is no rank of a job; run it with torchrun" in (
        capsys.readouterr().err
    )
