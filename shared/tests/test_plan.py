"""Plan files: what they refuse, and that what emitters write starts what the plan says."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.documents import digest
from trimtab.core.emitters import EMITTERS, emit
from trimtab.core.errors import BadInput, Unsupported
from trimtab.core.plan import Figure, Group, Objective, Plan, Route, Slot, Stage
from trimtab.core.solve import Certificate

OBJECTIVE = Objective(metric="rate", unit="req/s", better="higher", value=9.0, bound=10.0)


def slots(*places: tuple[str, int]) -> tuple[Slot, ...]:
    return tuple(Slot(node=node, device=device) for node, device in places)


def serving(**changes: Any) -> Plan:
    group = Group(
        name="h100x2",
        model="meta-llama/Llama-3.1-70B-Instruct",
        replicas=2,
        stages=(Stage(device="H100-SXM", tensor_parallel=2),),
        slots=(slots(("n1", 0), ("n1", 1)), slots(("n1", 2), ("n1", 3))),
        engine_args={"max_num_seqs": 64, "enable_prefix_caching": False, "quantization": "fp8"},
        env={"VLLM_LOGGING_LEVEL": "it's quoted"},
        usd_per_hour=11.96,
        expected={"tpot": Figure(value=0.02, unit="s")},
    )
    values: dict[str, Any] = {
        "planner": "fleet",
        "objective": OBJECTIVE,
        "groups": (group,),
        "routing": (Route(request_class="short", group="h100x2", weight=1.0),),
    }
    return Plan(**(values | changes))


def training(*ranks: tuple[str, int]) -> Plan:
    return Plan(planner="placement", objective=OBJECTIVE, ranks=slots(*ranks))


@settings(max_examples=25)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
    warnings=st.lists(st.text(max_size=20), max_size=2),
    details=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
)
def test_plan_survives_its_json(
    weights: list[float], warnings: list[str], details: dict[str, Any]
) -> None:
    groups = tuple(
        Group(name=f"g{i}", model="m", stages=(Stage(device="A40"),)) for i in range(len(weights))
    )
    routing = tuple(
        Route(request_class="all", group=f"g{i}", weight=w / sum(weights))
        for i, w in enumerate(weights)
    )
    plan = serving(groups=groups, routing=routing, warnings=tuple(warnings), details=details)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_file_is_read_back_and_names_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = serving()
    plan.write(path)
    assert Plan.read(path) == plan
    raw = json.loads(path.read_text())
    raw["version"] = 2
    path.write_text(json.dumps(raw, indent=2))
    with pytest.raises(BadInput, match=r"plan\.json:3: .*version 2; .*version 1"):
        Plan.read(path)
    raw["version"] = 1
    raw["grops"] = []
    path.write_text(json.dumps(raw, indent=2))
    with pytest.raises(BadInput, match="'groups'"):
        Plan.read(path)


def test_stale_inputs_are_named(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("nodes: []\n")
    plan = serving(inputs={"cluster": digest(cluster), "seed": digest(3)})
    assert plan.stale_inputs({"cluster": cluster, "seed": 3}) == []
    cluster.write_text("nodes: [a]\n")
    assert plan.stale_inputs({"cluster": cluster, "seed": 3, "trace": 1}) == ["cluster", "trace"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routing": (Route(request_class="s", group="h100", weight=1),)}, "h100x2"),
        ({"routing": (Route(request_class="s", group="h100x2", weight=0.5),)}, "sum to 0.5"),
        ({"groups": (serving().groups[0],) * 2}, "several groups"),
        ({"ranks": slots(("n1", 0), ("n1", 0))}, "given out twice"),
    ],
)
def test_inconsistent_plans_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        serving(**changes)


def test_group_slots_must_match_its_stages() -> None:
    stages = (Stage(device="A40", tensor_parallel=2),)
    with pytest.raises(ValueError, match="1 slots and its stages have 2"):
        Group(name="g", model="m", stages=stages, slots=(slots(("n", 0)),))
    with pytest.raises(ValueError, match="1 replicas have slots and there are 2"):
        Group(name="g", model="m", replicas=2, stages=stages, slots=(slots(("n", 0), ("n", 1)),))


def test_objective_keeps_the_solvers_proof() -> None:
    proof = Certificate("optimal", 4.0, 5.0, 0.1, "highs")
    objective = Objective.certified("cost", "USD/h", "lower", proof)
    assert (objective.value, objective.bound, objective.gap) == (4.0, 5.0, 0.25)
    unknown = Objective.certified("x", "1", "lower", Certificate("feasible", 4, -1e999, 0, "t"))
    assert unknown.bound is None
    assert unknown.gap is None


def run(script: str, tmp_path: Path, *arguments: str, **env: str) -> list[list[str]]:
    """Runs a script with every launcher replaced by one that prints what it was given."""
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    for tool in ("vllm", "deepspeed", "torchrun"):
        printer = 'printf "%s\\n" "${CUDA_VISIBLE_DEVICES:-}" "$(basename "$0")" "$@"\n'
        (tools / tool).write_text(f"#!/bin/bash\n{printer}")
        (tools / tool).chmod(0o755)
    # srun: one process a rank, in the order of the hostfile.
    (tools / "srun").write_text(
        "#!/bin/bash\nshift\nrank=0\ndeclare -A local\nwhile read -r node; do\n"
        'SLURM_PROCID=$rank SLURM_LOCALID=$((local[$node]++)) NODE=$node "$@"\n'
        'rank=$((rank+1)); done < "$SLURM_HOSTFILE"\n'
    )
    (tools / "srun").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script, "script", *arguments],
        env={**os.environ, "PATH": path, **env},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    return [line.split() for line in done.stdout.splitlines()]


def test_vllm_scripts_start_each_replica_on_its_devices(tmp_path: Path) -> None:
    files = emit(serving(), "vllm")
    assert sorted(files) == ["h100x2-0.sh", "h100x2-1.sh"]
    words = [w[0] for w in run(files["h100x2-1.sh"], tmp_path)]
    assert words[:4] == ["2,3", "vllm", "serve", "meta-llama/Llama-3.1-70B-Instruct"]
    options = words[4:]
    for name, value in (
        ("--tensor-parallel-size", "2"),
        ("--pipeline-parallel-size", "1"),
        ("--max-num-seqs", "64"),
        ("--quantization", "fp8"),
        ("--port", "8001"),
    ):
        assert options[options.index(name) + 1] == value
    assert "--no-enable-prefix-caching" in options
    assert "it'\"'\"'s quoted" in files["h100x2-0.sh"]


def test_vllm_replica_over_two_nodes_has_a_headless_follower() -> None:
    group = Group(
        name="pair",
        model="m",
        stages=(
            Stage(device="A40", tensor_parallel=2, layers=30),
            Stage(device="A40", tensor_parallel=2, layers=50),
        ),
        slots=(slots(("n1", 0), ("n1", 1), ("n2", 4), ("n2", 5)),),
    )
    files = emit(serving(groups=(group,), routing=()), "vllm")
    assert sorted(files) == ["pair-0-node0.sh", "pair-0-node1.sh"]
    first, second = files["pair-0-node0.sh"], files["pair-0-node1.sh"]
    assert "--headless" in second
    assert "--headless" not in first
    assert all("--master-addr n1" in text for text in files.values())
    assert all("VLLM_PP_LAYER_PARTITION=30,50" in text for text in files.values())
    assert "CUDA_VISIBLE_DEVICES=4,5" in second


def test_vllm_refuses_unequal_tensor_parallelism() -> None:
    stages = (Stage(device="A40", tensor_parallel=4), Stage(device="A40", tensor_parallel=2))
    plan = serving(groups=(Group(name="g", model="m", stages=stages),), routing=())
    with pytest.raises(Unsupported, match=r"\[2, 4\]"):
        emit(plan, "vllm")


RANKS = (("b", 2), ("b", 3), ("a", 0), ("a", 1))


def test_deepspeed_files(tmp_path: Path) -> None:
    files = emit(training(*RANKS), "deepspeed")
    assert files["hostfile"] == "b slots=4\na slots=2\n"
    words = [w[0] for w in run(files["launch.sh"], tmp_path, "train.py", "--lr=1") if w]
    assert words[words.index("--include") + 1] == "b:2,3@a:0,1"
    assert words[words.index("--hostfile") + 1] == "./hostfile"
    assert words[-2:] == ["train.py", "--lr=1"]
    assert words[words.index("--master_addr") + 1] == "b"


def test_torchrun_files() -> None:
    files = emit(training(*RANKS), "torchrun")
    assert list(files) == ["hostfile", "ranks", "nodes", "launch.sh"]
    assert files["nodes"] == "0 b 2,3\n1 a 0,1\n"
    assert "rendezvous.sh" in emit(training(*RANKS[2:]), "torchrun")


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param((("b", 1), ("a", 0), ("b", 0), ("a", 3)), id="by a file"),
        pytest.param((("b", 1), ("a", 1), ("b", 3), ("a", 3)), id="by a list"),
        pytest.param((("b", 0), ("a", 0), ("a", 1), ("a", 2)), id="by the local rank"),
    ],
)
def test_slurm_puts_any_rank_anywhere(tmp_path: Path, ranks: tuple[tuple[str, int], ...]) -> None:
    files = emit(training(*ranks), "slurm")
    for name in files.keys() - {"job.sbatch"}:
        (tmp_path / name).write_text(files[name])
    show = 'echo "$RANK" "$NODE" "$CUDA_VISIBLE_DEVICES" "$WORLD_SIZE" "$MASTER_ADDR" "$1"'
    lines = run(
        files["job.sbatch"], tmp_path, "bash", "-c", show, "_", "two words",
        SLURM_SUBMIT_DIR=str(tmp_path),
    )  # fmt: skip
    assert lines == [
        [str(rank), node, str(device), "4", "b", "two", "words"]
        for rank, (node, device) in enumerate(ranks)
    ]
    assert "#SBATCH --ntasks=4" in files["job.sbatch"]
    assert files["slurm-nodes"] == "b\na\n"
    most = max(device for _, device in ranks) + 1
    assert f"#SBATCH --gpus-per-node={most}" in files["job.sbatch"]


@pytest.mark.parametrize("target", ["deepspeed", "torchrun"])
def test_launchers_refuse_ranks_they_cannot_number(target: str) -> None:
    with pytest.raises(Unsupported, match="emit for slurm"):
        emit(training(("a", 0), ("b", 0), ("a", 1), ("b", 1)), target)
    with pytest.raises(BadInput, match="no ranks"):
        emit(serving(), target)


def test_deepspeed_refuses_devices_out_of_order_and_torchrun_uneven_nodes() -> None:
    with pytest.raises(Unsupported, match=r"\[1, 0\]"):
        emit(training(("a", 1), ("a", 0)), "deepspeed")
    with pytest.raises(Unsupported, match=r"\[1, 2\]"):
        emit(training(("a", 0), ("a", 1), ("b", 0)), "torchrun")


def test_names_cannot_smuggle_commands_into_scripts() -> None:
    with pytest.raises(ValueError, match="pattern"):
        Slot(node="n1\nrm -rf x", device=0)
    plan = serving(groups=(serving().groups[0].model_copy(update={"env": {"A=1;B": "x"}}),))
    with pytest.raises(BadInput, match="no environment variable"):
        emit(plan, "vllm")
    risky = serving(groups=(serving().groups[0].model_copy(update={"model": "$(touch x)"}),))
    assert "'$(touch x)'" in emit(risky, "vllm")["h100x2-0.sh"]


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(BadInput, match="slurm"):
        emit(serving(), "slrum")
    assert set(EMITTERS) == {
        *("vllm", "deepspeed", "torchrun", "slurm", "kubernetes", "mpi", "msccl"),
    }
