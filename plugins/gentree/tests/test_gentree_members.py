"""What the members of a group tell one another before they plan."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.cluster import Cluster, Link, Node
from trimtab.core.collectives import NetworkTree
from trimtab.core.cost import Constants
from trimtab.core.errors import BadInput
from trimtab.gentree import choose
from trimtab.gentree.members import Place, hear, slots, stay, tell


class Store(dict[str, str]):
    """A store that all have, in which nobody waits."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def get(self, key: str) -> str:  # type: ignore[override]
        return self[key]

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        if any(key not in self for key in keys):
            raise RuntimeError("wait timeout")


def cluster(count: int = 4) -> Cluster:
    return Cluster(
        nodes=tuple(Node(name=name, device="cpu", count=count) for name in ("a.x", "b.x", "c.y")),
        switches=("s",),
        links=tuple(
            Link(a=name, b="s", bandwidth_bytes_per_s=1e9) for name in ("a.x", "b.x", "c.y")
        ),
    )


def place(rank: int, host: str, device: int | None, **more: str) -> Place:
    return Place(rank, (host,), device, more.get("network", "n"), more.get("code", "1"))


@pytest.mark.parametrize(
    ("environment", "device"),
    [
        ({}, None),
        ({"LOCAL_RANK": "", "SLURM_LOCALID": "2"}, 2),
        ({"LOCAL_RANK": "3", "SLURM_LOCALID": "2"}, 3),
        ({"LOCAL_RANK": "0"}, 0),
        ({"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "0,1"}, 0),
        ({"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "3"}, None),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "3"}, 1),
    ],
)
def test_launchers_say_a_ranks_device(environment, device) -> None:
    assert Place.own(0, "", {"TRIMTAB_HOST": "h", **environment}).device == device


@pytest.mark.parametrize("wrong", ["-1", "one", "1.0", "²"])
def test_a_number_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(BadInput, match="LOCAL_RANK is"):
        Place.own(0, "", {"LOCAL_RANK": wrong})


def test_ranks_without_a_number_get_those_that_are_free() -> None:
    said = [place(0, "a", None), place(1, "b.x", None), place(2, "a", 0), place(3, "a", None)]
    assert slots(cluster(), said) == [("a.x", 1), ("b.x", 0), ("a.x", 0), ("a.x", 2)]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.integers(0, 3)), max_size=8).filter(
        lambda said: (
            len({each for each in said if each[1] is not None})
            == sum(each[1] is not None for each in said)
        )
    )
)
def test_no_two_ranks_share_a_device(said) -> None:
    found = slots(cluster(), [place(i, host, device) for i, (host, device) in enumerate(said)])
    assert len(set(found)) == len(said)
    for (host, device), (node, given_device) in zip(said, found, strict=True):
        assert node.partition(".")[0] == host
        assert device in (None, given_device)


def test_two_ranks_on_one_device_are_refused() -> None:
    with pytest.raises(BadInput, match=r"ranks 5 and 7 both .* device 1 of 'b\.x'; set LOCAL_RANK"):
        slots(cluster(), [place(5, "b", 1), place(6, "a", 1), place(7, "b.x", 1)])
    with pytest.raises(BadInput, match="rank 0 runs on 'd', which is no node"):
        slots(cluster(), [place(0, "d", 1)])


def test_an_order_that_is_none_is_refused() -> None:
    tree = NetworkTree.of_cluster(cluster(1))
    for order in ([0, 0, 1], [0, 1], [0, 1, 3], [0, 1, 2, 2]):
        with pytest.raises(BadInput, match="does not name each of 3 leaves once"):
            choose(tree, 1e6, Constants(), order=order)


def test_every_rank_hears_of_a_refusal_and_may_end_when_all_have() -> None:
    store, soon = Store(), timedelta(seconds=1)
    tell(store, 0, place(4, "a", 0))
    tell(store, 1, BadInput("no such file", where="net.yaml"))
    with pytest.raises(
        BadInput, match=r"rank 6 on .* cannot take part: net\.yaml: no such file\.$"
    ):
        hear(store, [4, 6])
    stay(store, 0, 2, soon)  # nobody hears it: it ends all the same
    stay(store, 1, 2, soon)
    assert {key for key in store if "read" in key} == {"trimtab/read/0", "trimtab/read/1"}


def test_all_members_plan_for_one_network_with_one_code() -> None:
    store = Store()
    said = [place(0, "a", 0), place(1, "b", None), place(2, "c", 3)]
    for member, each in enumerate(said):
        tell(store, member, each)
    assert hear(store, [0, 1, 2]) == said
    tell(store, 1, place(1, "b", 0, network="other"))
    with pytest.raises(BadInput, match="rank 1 on b plans for another network than rank 0 on a"):
        hear(store, [0, 1, 2])
    tell(store, 1, place(1, "b", 0, network="other", code="trimtab-gentree 9"))
    with pytest.raises(BadInput, match=r"rank 1 on b plans with trimtab-gentree 9, and rank 0"):
        hear(store, [0, 1, 2])
    assert "trimtab-gentree 0" in Place.own(0, "", {}).code
