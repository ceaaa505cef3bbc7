"""A real engine is measured, and its profile predicts it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from trimtab.core.cost.step import EngineProfile, StepBatch
from trimtab.core.errors import BadInput
from trimtab.core.simulate import ReplicaSpec, simulate
from trimtab.core.workload import Request
from trimtab.hosts.vllm.profiling import EngineProcess, profile, profile_of
from trimtab.hosts.vllm.simulator_bench import ENGINE, THREADS
from trimtab.hosts.vllm.small_model import small_model

pytestmark = pytest.mark.integration


def silent(message: str, done: float | None = None) -> None:
    pass


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with EngineProcess(small_model(), ENGINE, THREADS) as engine:
        yield engine


def test_the_limits_are_those_asked_for(engine: EngineProcess) -> None:
    limits = engine.wait_ready()
    assert (limits.max_num_seqs, limits.max_num_batched_tokens) == (8, 256)
    assert (limits.block_size, limits.kv_blocks) == (32, 39)
    assert limits.prefix_caching


def test_steps_are_told_apart(engine: EngineProcess) -> None:
    measured = engine.measure([(1, 300, 3), (8, 40, 2)])
    batches = [step.batch for step in measured.steps]
    first, second, *decodes = batches[:4]
    assert (first.prefills, first.prefill_tokens, first.decodes) == (1, 256, 0)
    assert (second.prefill_tokens, second.prefill_pairs) == (44, 44 * (256 + 22))
    assert [(b.decodes, b.kv_tokens, b.prefill_tokens) for b in decodes] == [
        (1, 301, 0),
        (1, 302, 0),
    ]
    crowd = batches[4:]
    assert sum(b.prefill_tokens for b in crowd) == 8 * 40
    assert sum(b.decodes for b in crowd) == 8
    assert any(b.decodes and b.prefills for b in crowd)
    assert all(step.seconds > 0 for step in measured.steps)
    assert measured.add_s > 0
    assert 0 < measured.cpu_share < 1.5


def test_a_profile_is_measured_and_kept(engine: EngineProcess, tmp_path: Path) -> None:
    measured = profile(engine, rounds=1, seed=0, progress=silent)
    assert measured.residuals is not None
    assert measured.residuals.steps > 20
    assert measured.step.seconds(StepBatch(prefills=1, prefill_tokens=64)) > 0
    assert measured.limits == engine.wait_ready()
    measured.write(tmp_path / "profile.json")
    assert EngineProfile.read(tmp_path / "profile.json") == measured


def test_a_replayed_workload_ends_in_the_simulated_order(
    engine: EngineProcess,
) -> None:
    requests = [Request(str(n), 0.0, 60, 20 + n) for n in range(4)]
    measured = engine.measure([(1, 40, 6), (4, 60, 6), (8, 40, 8), (1, 300, 4)])
    ends = engine.replay(requests, seed=1).ends
    assert ends == sorted(ends)
    assert min(ends) > 0
    result = simulate(requests, [ReplicaSpec(profile_of(engine, measured.steps, measured.add_s))])
    assert [call.request_id for call in result.calls] == ["0", "1", "2", "3"]


def test_an_engine_that_cannot_start_says_why() -> None:
    engine = EngineProcess(small_model(), {"max_model_len": -5}, THREADS)
    with pytest.raises(BadInput, match="max_model_len"), engine:
        engine.wait_ready()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"config\.json"), EngineProcess(tmp_path):
        pass
