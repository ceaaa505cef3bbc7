"""The report page: its structure, what it says, and that it needs no network."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from trimtab.core.cluster import Cluster
from trimtab.core.errors import BadInput
from trimtab.core.plan import Objective, Plan
from trimtab.placement.job import TrainingJob
from trimtab.placement.planner import plan_placement
from trimtab.placement.report import report_page
from trimtab.placement.table import plan_table, shown_bytes

VOID = {"meta", "br", "hr", "img", "input", "link"}


def cluster_of(pods, per_pod, name="net", prefix="n"):
    nodes, links = [], []
    # Neighbouring names lie in different pods.
    for index in range(pods * per_pod):
        nodes.append({"name": f"{prefix}{index:03d}", "device": "H100-SXM", "count": 8})
        leaf = f"pod{index % pods}"
        links.append({"a": f"{prefix}{index:03d}", "b": leaf, "bandwidth_bytes_per_s": 5e10})
    switches = [f"pod{pod}" for pod in range(pods)]
    if pods > 1:
        links += [{"a": leaf, "b": "core", "bandwidth_bytes_per_s": 1e11} for leaf in switches]
        switches = [*switches, "core"]
    return Cluster.model_validate(
        {"name": name, "nodes": nodes, "switches": switches, "links": links}
    )


def planned(cluster, rows, columns):
    job = TrainingJob(
        name="job", tensor_parallel=8, pipeline_parallel=columns, data_parallel=rows, alpha=0.3
    )
    return plan_placement(cluster, job)


class Page(HTMLParser):
    """A page whose elements are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.said = [], [], []
        self.count = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        name = f"{tag}.{given['class']}" if given.get("class") else tag
        self.count[name] = self.count.get(name, 0) + 1
        if given.get("class") == "cell":
            self.cells.append((int(given["data-r"]), int(given["data-c"]), given["fill"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def test_each_cell_is_in_both_matrices_and_in_the_tree():
    cluster = cluster_of(3, 5)
    page = Page(report_page(planned(cluster, 6, 2), cluster))
    cells = sorted((r, c) for r, c, _ in page.cells)
    assert cells == sorted((r, c) for r in range(6) for c in range(2) for _ in range(3))
    assert page.count["rect.idle"] == 3
    assert page.count["svg.cells"] == 3


def test_colours_are_the_pods_of_the_plan():
    cluster = cluster_of(3, 5)
    plan = planned(cluster, 5, 2)
    before, after = (Page(report_page(plan, cluster)).cells[i * 10 : (i + 1) * 10] for i in (0, 1))

    def widest(cells, axis):
        lines = {}
        for cell in cells:
            lines.setdefault(cell[axis], set()).add(cell[2])
        return max(map(len, lines.values()))

    assert widest(after, 0) == plan.expected["pipeline_spread"].value == 1
    assert widest(after, 1) == plan.expected["data_spread"].value
    assert widest(before, 0) == 2


def test_the_front_and_the_bound_are_drawn():
    cluster = cluster_of(3, 5)
    plan = planned(cluster, 6, 2)
    page = Page(report_page(plan, cluster))
    assert page.count["circle.point"] == len(plan.details["front"])
    assert page.count["rect.before"] == 1
    assert page.count["rect.impossible"] >= 1


def test_the_page_needs_no_network_and_is_whole():
    cluster = cluster_of(2, 4)
    text = report_page(planned(cluster, 4, 2), cluster)
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://""", text)
    assert text.rstrip().endswith("</html>")
    assert "$" not in text


def test_bytes_between_pods_are_drawn_before_and_after():
    cluster = cluster_of(3, 4)
    job = TrainingJob(
        tensor_parallel=8, pipeline_parallel=2, data_parallel=6, alpha=0.3,
        volumes={"data": 3e9, "pipeline": 2e9},
    )  # fmt: skip
    plan = plan_placement(cluster, job)
    page = Page(report_page(plan, cluster))
    facts = plan.details["communication"]
    drawn = sum(len(to) for when in facts["between"].values() for to in when.values())
    assert page.count["rect.flow"] == drawn
    assert page.count["svg.bytes"] == 2
    # Neighbours by name lie in different pods, and the stages of a row in one.
    assert "By hostname: 288 GB a step" in page.said
    data, pipeline = (facts["crossing"]["leaf"][kind]["after"] for kind in ("data", "pipeline"))
    assert f"By the plan: {shown_bytes(data + pipeline)} a step" in page.said
    assert "3 GB" in page.said
    assert any("weight of data spread comes from: given" in said for said in page.said)


def test_the_table_tells_bytes_and_where_the_weight_is_from():
    training = TrainingJob(
        tensor_parallel=8, pipeline_parallel=2, data_parallel=6,
        volumes={"data": 3e9, "pipeline": 2e9}, overlap={"data": 0.5},
    )  # fmt: skip
    told = printed(plan_placement(cluster_of(3, 4), training))
    assert re.search(r"data +3 GB +288 GB +", told)
    assert re.search(r"pipeline +2 GB +0 B +", told)
    assert "alpha 0.062: volumes and measured overlap" in told
    unknown = printed(planned(cluster_of(3, 4), 6, 2))
    assert "alpha 0.3: given" in unknown
    assert "bytes are not known" in unknown


def printed(plan):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plan_table(plan))
    return console.export_text()


def test_without_a_model_the_page_says_that_bytes_are_not_known():
    cluster = cluster_of(2, 4)
    page = Page(report_page(planned(cluster, 4, 2), cluster))
    assert "svg.bytes" not in page.count
    assert any("How much groups send is not known" in said for said in page.said)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0.0, "0 B"),
        (1500.0, "1.5 kB"),
        (999_999.0, "1 MB"),
        (3.2e16, "32 PB"),
        (1e20, "100,000 PB"),
    ],
)
def test_bytes_are_shown_with_three_figures(count, words):
    assert shown_bytes(count) == words


def test_names_are_escaped():
    cluster = cluster_of(2, 4, name="<b>&</b></script>")
    plan = planned(cluster, 4, 2)
    warned = plan.model_copy(update={"warnings": ("a < b </script>",)})
    page = Page(report_page(warned, cluster))
    assert page.count.get("b", 0) == 4 + 2  # facts and captions, none from the name
    assert page.count["section.warn"] == 1
    assert any("a < b </script>" in said for said in page.said)


def test_one_switch_and_more_nodes_than_can_be_drawn():
    flat = cluster_of(1, 6)
    assert "Before and after" in report_page(planned(flat, 3, 2), flat)
    wide = cluster_of(30, 140)
    page = Page(report_page(planned(wide, 10, 8), wide))
    assert len(page.cells) == 2 * 80  # the matrices; the tree has bars


def test_another_planners_plan_and_another_cluster_are_refused():
    cluster = cluster_of(2, 4)
    other = Plan(
        planner="fleet", objective=Objective(metric="m", unit="1", better="lower", value=1)
    )
    with pytest.raises(
        BadInput, match="the planner 'fleet'; give a plan of trimtab plan placement"
    ):
        report_page(other, cluster)
    with pytest.raises(BadInput, match=r"'n000' is none of net; give the cluster"):
        report_page(planned(cluster, 4, 2), cluster_of(2, 4, prefix="m"))
