"""The table of docs/cost-model.md is what ``trimtab bench cost`` finds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cost-model.md"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("aiconfigurator_core") is None,
    reason="aiconfigurator-core, which ships the measured rows, is not installed",
)


def rows() -> dict[str, dict[str, float]]:
    """The page's figures by case name."""
    table = PAGE.read_text().split("<!-- errors -->")[1].split("<!-- errors end -->")[0]
    found = {}
    for line in table.strip().splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        name = "/".join(["model", *dict.fromkeys(cells[:2]), "tpot"])
        raw, defaults, calibrated = (float(cell.rstrip("%")) / 100 for cell in cells[3:6])
        found[name] = {"raw-roofline": raw, "untuned-defaults": defaults, "ours": calibrated}
    return found


def test_page_shows_the_benchmarks_errors() -> None:
    from trimtab.core.benchmark import Options
    from trimtab.core.cost.bench import BENCHMARK

    cases = BENCHMARK.run(Options(), lambda message, done=None: None)
    measured: dict[str, dict[str, float]] = {}
    for case in cases:
        if case.metric == "tpot_mape":
            figures = measured.setdefault(case.case, {})
            figures[case.baseline] = case.baseline_value
            figures["ours"] = case.value
    page = rows()
    assert set(page) == set(measured)
    for name, figures in page.items():
        assert figures == pytest.approx(measured[name], abs=6e-4), name
