"""The page with pictures of a plan, and from which size on which plan is best."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from trimtab.core.cluster import Cluster, Link, Node
from trimtab.core.collectives import Layout, NetworkTree
from trimtab.core.collectives.combine import ring
from trimtab.core.cost import Constants
from trimtab.core.errors import BadInput
from trimtab.core.plan import Objective, Plan
from trimtab.gentree import plan_allreduce
from trimtab.gentree.overtaking import reigns
from trimtab.gentree.plan_pictures import messages_picture
from trimtab.gentree.planner import planned_breakpoints
from trimtab.gentree.report import report_page, write_report

CONSTANTS = Constants(alpha_s=1e-3, incast_threshold=4, delta_s_per_byte=1e-10)


def racks(count: int, hosts: int, name: str = "racks") -> Cluster:
    nodes = tuple(Node(name=f"n{i}", device="cpu") for i in range(count * hosts))
    links = [
        Link(a=node.name, b=f"leaf{i // hosts}", bandwidth_bytes_per_s=1e9)
        for i, node in enumerate(nodes)
    ]
    links += [Link(a=f"leaf{i}", b="core", bandwidth_bytes_per_s=1e9) for i in range(count)]
    switches = (*(f"leaf{i}" for i in range(count)), "core")
    return Cluster(name=name, nodes=nodes, switches=switches, links=tuple(links))


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str, kind: str) -> int:
        return sum(t == tag and a.get("class") == kind for t, a in self.found)


def test_the_page_draws_every_step_and_every_link(tmp_path) -> None:
    cluster = racks(2, 4)
    plan = plan_allreduce(cluster, [2**12, 2**24], constants=CONSTANTS)
    page = Elements(report_page(plan, cluster))
    from trimtab.gentree.planner import planned_sizes

    steps = sum(len(size.schedule.steps) for size in planned_sizes(plan))
    assert page.count("rect", "frame") == steps
    assert page.count("line", "link") + page.count("line", "hot") == steps * (8 + 2)
    assert page.count("line", "hot") >= steps
    assert page.count("polyline", "ours") == page.count("polyline", "bound") == 1
    assert "16 MiB: below" in page.text
    assert "AllReduce of 8 ranks on racks" in page.text
    assert not any("http" in (value or "") for _, a in page.found for value in a.values())
    write_report(plan, cluster, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == report_page(plan, cluster)


def test_steps_in_one_shot_are_told_and_messages_take_time() -> None:
    cluster = racks(2, 4)
    constants = CONSTANTS.model_copy(update={"alpha_s": 1e-6, "message_s": 1.0, "processors": 8})
    page = Elements(report_page(plan_allreduce(cluster, [2**12], constants=constants), cluster))
    assert "all but those in one shot" in page.text
    seconds = [float(found) for found in re.findall(r"round, ([0-9.]+) s", page.text)]
    assert len(seconds) == page.text.count("Step ")
    assert min(seconds) > 0.1
    dear = CONSTANTS.model_copy(update={"alpha_s": 1.0})
    page = Elements(report_page(plan_allreduce(cluster, [2**12], constants=dear), cluster))
    assert "in one shot" in page.text.replace("all but those in one shot", "")


def test_hostile_names_stay_text() -> None:
    cluster = racks(2, 2, name="<script>alert(1)</script>")
    page = report_page(plan_allreduce(cluster, [2**20]), cluster)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_the_picture_of_messages_holds_what_a_ring_sends() -> None:
    step, _ = ring([Layout.whole(rank) for rank in range(4)])
    cells = [a for t, a in Elements(messages_picture(step, 4)).found if a.get("class") == "sent"]
    assert len(cells) == 4  # each to the next one alone


def test_a_plan_of_another_planner_has_no_page() -> None:
    objective = Objective(metric="x", unit="1", better="lower", value=1)
    with pytest.raises(BadInput, match="planner 'placement'"):
        report_page(Plan(planner="placement", objective=objective), racks(2, 2))
    cluster = racks(2, 2)
    with pytest.raises(BadInput, match="no node"):
        report_page(plan_allreduce(racks(2, 4), [2**20]), cluster)


def test_each_size_has_the_plan_that_is_best_there() -> None:
    cluster = racks(3, 6)
    plan = plan_allreduce(cluster, [2**20], constants=CONSTANTS, breakpoints=True)
    found = planned_breakpoints(plan)
    assert found[0].from_bytes == 2**10
    assert found[-1].to_bytes == 2**32
    assert all(a.to_bytes == b.from_bytes for a, b in pairwise(found))
    assert all(a.switches != b.switches for a, b in pairwise(found))
    assert len(found) > 1
    # Few rounds first.
    assert found[0].rounds <= min(reign.rounds for reign in found)


def test_without_being_asked_a_plan_names_no_breakpoints() -> None:
    assert planned_breakpoints(plan_allreduce(racks(2, 2), [2**20])) == []


def test_one_rank_has_one_plan() -> None:
    tree = NetworkTree.of_cluster(racks(1, 1))
    (reign,) = reigns(tree, CONSTANTS)
    assert (reign.from_bytes, reign.to_bytes, reign.rounds) == (2**10, 2**32, 0)
