"""The planner against all pairs on the simulator, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from trimtab.branches import plugin
from trimtab.branches.curves import curves_picture
from trimtab.branches.demand import Demand, Slo
from trimtab.branches.estimate import estimate
from trimtab.branches.lengths import LengthTrace, RecordedBranch, read_lengths
from trimtab.branches.planner import UNSCORED, plan_branches, side_of
from trimtab.branches.report import report_page
from trimtab.branches.simulated_serving import serve
from trimtab.core.cost.step import EngineLimits, EngineProfile, StepCost
from trimtab.core.errors import BadInput, Infeasible
from trimtab.core.plan import Figure, Objective, Plan

FAMILIES = {
    "exponential": lambda rng, size: rng.exponential(1.0, size),
    "lognormal .62": lambda rng, size: rng.lognormal(-(0.62**2) / 2, 0.62, size),
    "lognormal 1.0": lambda rng, size: rng.lognormal(-0.5, 1.0, size),
    "normal .2": lambda rng, size: rng.normal(1.0, 0.2, size).clip(0.1),
    "two kinds": lambda rng, size: np.where(
        rng.random(size) < 0.7, rng.normal(0.5, 0.1, size).clip(0.1), rng.normal(2.2, 0.3, size)
    ),
}
ENGINE = EngineProfile(
    model="m",
    device="d",
    engine="e",
    limits=EngineLimits(
        max_num_seqs=64,
        max_num_batched_tokens=512,
        max_model_len=8000,
        block_size=16,
        kv_blocks=700,
    ),
    step=StepCost(base_s=0.01, decode_s=1e-4, kv_token_s=1e-6),
)
MOST = 5
EXAMPLE = Path(__file__).parents[3] / "examples" / "branches" / "lengths.jsonl"


def trace(family: str, *, questions: int = 60, seed: int = 0) -> LengthTrace:
    rng = np.random.default_rng(seed)
    branches = []
    for question in range(questions):
        lengths = 200 * np.exp(0.3 * rng.normal()) * FAMILIES[family](rng, 12)
        chance = rng.beta(1.5, 1.5)
        for length in lengths:
            right = bool(rng.random() < chance)
            score = 1 / (1 + np.exp(-rng.normal(1.2 * right)))
            tokens = max(2, round(float(length)))
            branches.append(RecordedBranch(f"q{question}", tokens, True, right, float(score)))
    return LengthTrace.of(branches)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_within_a_twentieth_of_the_best_pair(family: str) -> None:
    demand = Demand(trace(family), rate_per_s=0.6, profile=ENGINE, prompt_tokens=50)
    slo = Slo(accuracy=0.6)
    plan = plan_branches(demand, slo, most=MOST)
    config = plan.details["config"]
    # Other questions than those that the planner simulated.
    crowd = demand.crowd(MOST, 16, seed=99, count=100)
    seconds = {}
    for n in range(1, MOST + 1):
        for m in range(1, n + 1):
            if estimate(demand, n, m).accuracy >= 0.6:
                served = serve(crowd, side_of(n, m, "off"), UNSCORED, ENGINE)
                seconds[n, m] = fmean(served.latencies_s)
    chosen = seconds[config["n"], config["m"]]  # type: ignore[index,call-overload]
    assert chosen <= 1.05 * min(seconds.values())
    assert len(seconds) > 4


def test_estimates_are_near_the_simulator() -> None:
    demand = Demand(trace("lognormal .62"), rate_per_s=0.3, profile=ENGINE, prompt_tokens=50)
    crowd = demand.crowd(8, 16, seed=5, count=500)
    for n, m in ((1, 1), (4, 2), (8, 4)):
        guess = estimate(demand, n, m)
        served = serve(crowd, side_of(n, m, "off"), UNSCORED, ENGINE)
        assert guess.latency_s == pytest.approx(fmean(served.latencies_s), rel=0.1)
        assert guess.tokens == pytest.approx(served.tokens / 500, rel=0.1)


def test_load_decides() -> None:
    lengths = trace("lognormal .62")
    idle, busy = (
        plan_branches(
            Demand(lengths, rate_per_s=rate, profile=ENGINE, prompt_tokens=50),
            Slo(accuracy=0.6),
            most=8,
        )
        for rate in (0.1, 2.8)
    )
    for plan in (idle, busy):
        # Pruning that makes the answer late, or wrong, is left out.
        figures = plan.expected
        assert figures["mean latency"].value <= figures["mean latency without pruning"].value
        assert plan.objective.value == figures["mean latency"].value
    assert idle.details["config"]["n"] > busy.details["config"]["n"]  # type: ignore[index,call-overload,operator]


def test_without_an_accuracy_it_is_made_high() -> None:
    demand = Demand(trace("exponential"), rate_per_s=0.3, profile=ENGINE, prompt_tokens=50)
    tight, loose = (plan_branches(demand, Slo(latency_s=s), most=6) for s in (2.0, 20.0))
    assert loose.expected["accuracy"].value > tight.expected["accuracy"].value
    assert tight.expected["mean latency"].value <= 2.0
    assert loose.objective.metric == "accuracy"


@pytest.mark.parametrize(
    ("rate", "slo", "words"),
    [
        (50.0, Slo(accuracy=0.6), "does not keep up even with the cheapest pair; with N="),
        (0.3, Slo(accuracy=0.999), "reaches an accuracy of 0.999; the most accurate"),
        (0.3, Slo(latency_s=0.001), "no pair is estimated to keep latency<=0.001s; the fastest"),
        (0.3, Slo(accuracy=0.6, p97_s=0.1), r"keep accuracy>=0.6, p97<=0.1s on the simulator"),
    ],
)
def test_what_cannot_be_is_said(rate: float, slo: Slo, words: str) -> None:
    demand = Demand(trace("exponential"), rate_per_s=rate, profile=ENGINE)
    with pytest.raises(Infeasible, match=words):
        plan_branches(demand, slo, most=4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fast", "'fast' is no condition"),
        ("accuracy<=0.5", "is no condition"),
        ("accuracy>=0.5s", "is no condition"),
        ("accuracy>=1.5", "the accuracy is 1.5; give one between 0 and 1"),
        ("latency<=3s, latency<=4s", "'latency<=4s' is the second of its kind"),
        ("p97<=0s", "out of reach"),
    ],
)
def test_a_wrong_objective_is_named(text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Slo.parse(text)


def test_an_objective_is_read() -> None:
    slo = Slo.parse("accuracy >= 0.8, p97<=90s")
    assert slo == Slo(accuracy=0.8, p97_s=90.0)
    assert slo.text == "accuracy>=0.8, p97<=90s"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate_per_s": 0.0}, "--rate is 0; give a number above 0"),
        ({"rate_per_s": float("nan")}, "--rate is nan"),
        ({"prompt_tokens": 0}, "--prompt is 0"),
        ({"accuracy": 1.5}, "--accuracy is 1.5"),
        ({"auroc": 0.0}, "--auroc is 0"),
    ],
)
def test_a_wrong_demand_is_named(changes: dict[str, float], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Demand(trace("exponential", questions=3), **{"rate_per_s": 1.0, **changes})  # type: ignore[arg-type]


def test_what_the_trace_lacks_is_named() -> None:
    bare = LengthTrace.of([RecordedBranch("q", n, True) for n in (3, 4)], "bare")
    with pytest.raises(
        BadInput, match=r"bare: no branch says whether it was correct; .*--accuracy"
    ):
        Demand(bare, 1.0)
    with pytest.raises(BadInput, match=r"bare: no question has both .*--auroc"):
        Demand(bare, 1.0, accuracy=0.5)
    assert Demand(bare, 1.0, accuracy=0.5, auroc=0.7).selection == 0.7


def test_a_curve_that_does_not_keep_up_ends() -> None:
    picture = curves_picture(
        {"M = 1": [(1, 2.0), (2, 1.0)], "M = 2": [(2, 3.0)], "<b>": [(1, 900.0)]},
        across="N",
        chosen=(2.0, 1.0),
        chosen_line="M = 1",
    )
    assert picture.count("<polyline") == 2
    assert "<b>" not in picture


def test_a_report_of_another_plan_is_refused() -> None:
    other = Plan(
        planner="placement",
        objective=Objective(metric="x", unit="1", better="lower", value=1.0),
        expected={"x": Figure(value=1.0, unit="1")},
    )
    with pytest.raises(BadInput, match="planner 'placement'"):
        report_page(other)


def test_the_command(tmp_path: Path) -> None:
    app = Typer()
    app.callback()(lambda: None)
    plugin.trimtab_commands(app)
    recorded = trace("lognormal .62", questions=40)
    lines = [
        {
            "question": b.question,
            "tokens": b.tokens,
            "finished": b.finished,
            "correct": b.correct,
            "score": b.score,
        }
        for b in recorded.branches
    ]
    lengths, engine = tmp_path / "lengths.jsonl", tmp_path / "engine.json"
    lengths.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ENGINE.write(engine)
    plan, page = tmp_path / "plan.json", tmp_path / "page.html"
    arguments = ["plan", "branches", "--lengths", str(lengths), "--rate", "0.3", "--most", "4"]
    arguments += ["--slo", "accuracy>=0.6", "--profile", str(engine), "--prompt", "50"]
    shown = CliRunner().invoke(app, [*arguments, "--out", str(plan), "--report", str(page)])
    assert shown.exit_code == 0, shown.output
    config = Plan.read(plan).details["config"]
    assert json.dumps({"trimtab": {"branches": config}}) in shown.output.replace("\n", "")
    assert page.read_text().count("<svg") == 4
    printed = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(printed.stdout)["details"]["config"] == config


def test_the_example_is_planned() -> None:
    recorded = read_lengths(EXAMPLE)
    assert recorded.auroc is not None
    assert 0.6 < recorded.auroc < 0.75
    plan = plan_branches(Demand(recorded, rate_per_s=2.0), Slo(accuracy=0.5))
    config = plan.details["config"]
    assert (config["n"], config["m"]) == (16, 3)  # type: ignore[index,call-overload]
    assert 0.3 < plan.expected["mean latency"].value < 0.4
