"""The report page in a real browser: its script runs, and pointing at a node picks its group."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from trimtab.core.cluster import Cluster
from trimtab.placement.job import TrainingJob
from trimtab.placement.planner import plan_placement
from trimtab.placement.report import report_page

pytestmark = pytest.mark.integration

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PICK = """
<script>
window.onerror = message => { document.title = "ERROR " + message; };
document.querySelector('button[data-kind="c"]').click();
document.querySelectorAll('.cell[data-r="2"][data-c="1"]')[1]
  .dispatchEvent(new MouseEvent("click"));
const on = [...document.querySelectorAll(".cell.on")];
document.title = [on.length, on.every(c => c.dataset.c === "1"), said.textContent].join("|");
</script>
</body>"""


def cluster() -> Cluster:
    nodes = [{"name": f"n{i:02d}", "device": "H100-SXM", "count": 8} for i in range(12)]
    links = [
        {"a": f"n{i:02d}", "b": f"pod{i % 3}", "bandwidth_bytes_per_s": 5e10} for i in range(12)
    ]
    links += [{"a": f"pod{p}", "b": "core", "bandwidth_bytes_per_s": 1e11} for p in range(3)]
    switches = ["pod0", "pod1", "pod2", "core"]
    return Cluster.model_validate(
        {"name": "net", "nodes": nodes, "switches": switches, "links": links}
    )


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_pointing_at_a_node_picks_its_group_in_all_pictures(tmp_path):
    job = TrainingJob(tensor_parallel=8, pipeline_parallel=2, data_parallel=6, alpha=0.3)
    network = cluster()
    page = report_page(plan_placement(network, job), network)
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", PICK))
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    count, all_of_the_column, said = title.split("|")
    # Six nodes of the column, in two matrices and in the tree.
    assert (count, all_of_the_column) == ("18", "true")
    assert said.startswith("Data parallel group 1: by hostname in 3 (")
