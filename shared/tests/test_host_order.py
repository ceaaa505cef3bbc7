"""The order of hosts: matching of names, new ranks, and what differs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.errors import BadInput
from trimtab.hosts.host_order import difference, lookup, new_ranks, own_host, read_order

names = st.sampled_from(["a", "b", "c", "d", "e.x"])


@given(st.lists(names, unique=True), st.lists(names))
def test_new_ranks_are_a_permutation_in_the_plans_order(order, hosts):
    ranks = new_ranks(order, hosts)
    assert sorted(ranks) == list(range(len(hosts)))
    placed = [hosts[ranks.index(rank)] for rank in range(len(hosts))]
    planned = [host for host in placed if host in order]
    assert placed[: len(planned)] == planned
    assert planned == sorted(planned, key=order.index)


def test_nodes_of_one_name_and_unplanned_ones_keep_their_order():
    assert new_ranks(["b", "a"], ["z", "a", "b", "y", "b"]) == [3, 2, 0, 4, 1]


@pytest.mark.parametrize(
    ("host", "order", "place"),
    [
        ("b", ["a", "b"], 1),
        ("b.one", ["a", "b"], 1),
        ("b", ["a", "b.one"], 1),
        ("b.one", ["b.two", "b.one"], 1),
        ("b", ["b.two", "b.one"], None),
        ("10.0.0.2", ["10.0.0.1", "10.0.0.2"], 1),
        ("10.0.0.3", ["10.0.0.1", "10.0.0.2"], None),
    ],
)
def test_a_name_matches_with_or_without_its_domain(host, order, place):
    assert lookup(order)(host) == place


def test_what_differs():
    assert difference(["a", "b"], ["b", "a", "a"]) == ""
    assert difference(["a", "b"], ["b", "c"]) == "a is missing and c is not planned"
    assert difference(list("abcde"), ["a"]) == "b, c, d and 1 more are missing"


def test_the_variable_goes_before_the_host_name():
    assert own_host({"TRIMTAB_HOST": "n7"}) == "n7"
    assert own_host({})


def test_an_order_that_is_neither_plan_nor_hostfile(tmp_path):
    path = tmp_path / "order"
    for text, sentence in [
        ("a 2\n", "order:1: 'a 2' is no entry of a hostfile"),
        ("a slots=1\na slots=1\n", "'a' is given twice"),
        ('{"kind": "trimtab-plan", "version": 9}', "the plan has version 9"),
        ('{"kind": "other", "version": 1}', "kind"),
    ]:
        path.write_text(text)
        with pytest.raises(BadInput, match=sentence):
            read_order(path)
