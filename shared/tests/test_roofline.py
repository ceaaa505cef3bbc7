"""The roofline: its FLOPs and bytes against other counts, and how its step times behave."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.cost import (
    DEFAULTS,
    RAW,
    ModelWork,
    Precision,
    Replica,
    Roofline,
    StepBatch,
    to_step_cost,
)
from trimtab.core.cost.roofline import compute_rate
from trimtab.core.devices import device
from trimtab.core.errors import BadInput, Infeasible
from trimtab.core.model import Experts, LatentAttention, ModelSpec

LLAMA_70B = ModelSpec(
    name="Llama-3.1-70B",
    layers=80,
    hidden=8192,
    heads=64,
    kv_heads=8,
    head_dim=128,
    intermediate=28672,
    vocab=128256,
)
SPARSE = ModelSpec(
    name="sparse",
    layers=12,
    hidden=1024,
    heads=16,
    kv_heads=4,
    head_dim=64,
    intermediate=4096,
    vocab=32000,
    experts=Experts(count=16, active=2, intermediate=2048, dense_layers=frozenset({0})),
)
SLIDING = SPARSE.model_copy(
    update={"experts": None, "sliding_window": 128, "sliding_layers": frozenset(range(0, 12, 2))}
)
LATENT = SPARSE.model_copy(
    update={
        "kv_heads": 16,
        "latent": LatentAttention(q_rank=512, kv_rank=256, nope_dim=64, rope_dim=32, value_dim=64),
    }
)
MODELS = [LLAMA_70B, SPARSE, SLIDING, LATENT]
H100 = device("H100-SXM")


def prefill(tokens: int, context: int = 0) -> StepBatch:
    pairs = tokens * (context + tokens / 2)
    return StepBatch(prefills=1, prefill_tokens=tokens, prefill_pairs=pairs)


def decode(batch: int, context: int) -> StepBatch:
    return StepBatch(decodes=batch, kv_tokens=batch * context)


def test_work_agrees_with_vllms_own_count_for_llama_70b() -> None:
    """Figures of vllm.v1.metrics.perf.ModelMetrics, vLLM 0.32."""
    work = ModelWork.of(LLAMA_70B, Precision()).work(decode(32, 1000))
    assert work.flops == pytest.approx(4.53e12, rel=0.02)
    assert work.weight_bytes + work.cache_bytes == pytest.approx(150.1e9, rel=0.02)
    prompt = ModelWork.of(LLAMA_70B, Precision()).work(prefill(2455))
    assert prompt.flops == pytest.approx(351.9e12, rel=0.03)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@settings(max_examples=25)
@given(tokens=st.integers(16, 4000))
def test_flops_are_the_models_own(model: ModelSpec, tokens: int) -> None:
    summed = ModelWork.of(model, Precision())
    # The model counts tokens exactly, and a sliding window by its ramp: windows differ by it.
    window = 0.1 if model.sliding_layers else 0.01
    assert summed.work(prefill(tokens)).flops == pytest.approx(
        model.prefill_flops(tokens), rel=window
    )
    assert summed.work(decode(1, tokens)).flops == pytest.approx(
        model.decode_flops(tokens), rel=0.01
    )


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@given(tokens=st.integers(1, 4000))
def test_weights_read_are_the_parameters_touched(model: ModelSpec, tokens: int) -> None:
    work = ModelWork.of(model, Precision()).work(decode(tokens, 1))
    assert work.weight_bytes == pytest.approx(2 * model.touched_parameters(tokens), rel=1e-3)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_all_weights_are_the_models_bytes(model: ModelSpec) -> None:
    assert ModelWork.of(model, Precision()).weight_bytes == pytest.approx(
        model.weight_bytes(2.0), rel=1e-6
    )


def test_only_the_experts_shrink_with_their_type() -> None:
    whole = ModelWork.of(SPARSE, Precision("bf16", "bf16"))
    packed = ModelWork.of(SPARSE, Precision("bf16", "mxfp4"))
    experts = 16 * 11 * 3 * 1024 * 2048
    assert whole.weight_bytes - packed.weight_bytes == pytest.approx(experts * (2 - 0.53125))


batches = st.builds(
    lambda b, c, p, n: StepBatch(b, b * c, p, p * n, p * n * n / 2),
    st.integers(1, 256),
    st.integers(1, 8000),
    st.integers(0, 4),
    st.integers(1, 2000),
)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@given(batch=batches, tensor=st.sampled_from([1, 2, 4, 8]))
def test_step_time_grows_with_work_and_never_beats_the_raw_roofline(
    model: ModelSpec, batch: StepBatch, tensor: int
) -> None:
    replica = Replica(model, H100, tensor)
    seconds = Roofline(replica).seconds(batch)
    assert seconds >= Roofline(replica, RAW).seconds(batch) > 0
    more = replace(
        batch,
        decodes=batch.decodes + 1,
        kv_tokens=batch.kv_tokens + 10,
        prefill_tokens=batch.prefill_tokens + batch.prefills,
        prefill_pairs=batch.prefill_pairs + 10 * batch.prefills,
    )
    assert Roofline(replica).seconds(more) >= seconds
    worse = Roofline(replica, DEFAULTS.calibrated(0.8, DEFAULTS.step_s)).seconds(batch)
    assert worse > seconds


@given(batch=batches)
def test_soft_corner_lies_between_the_larger_term_and_the_sum(batch: StepBatch) -> None:
    replica = Replica(LLAMA_70B, H100)
    hard = Roofline(replica, replace(RAW, norm=math.inf)).seconds(batch)
    soft = Roofline(replica, replace(RAW, norm=1.4)).seconds(batch)
    summed = Roofline(replica, replace(RAW, norm=1.0)).seconds(batch)
    assert hard <= soft * (1 + 1e-12)
    assert soft <= summed * (1 + 1e-12)


def test_raw_decode_step_reads_everything_once() -> None:
    """By hand: (70.55e9 - 1.05e9) weights of 2 bytes at 3.35 TB/s, and 8 sequences' cache."""
    seconds = Roofline(Replica(LLAMA_70B, H100, 2), RAW).seconds(decode(8, 1000))
    cache = 8 * 1001 * 80 * 2 * 8 * 128 * 2
    activations = 8 * 80 * 8192 * 8 * 2
    assert seconds == pytest.approx((2 * 69.5e9 + cache + activations) / 2 / 3.35e12, rel=1e-3)


def test_default_overheads_are_the_documented_ones() -> None:
    base = Roofline(Replica(LLAMA_70B, H100, 4), replace(RAW, step_s=DEFAULTS.step_s))
    raw = Roofline(Replica(LLAMA_70B, H100, 4), RAW)
    batch = decode(64, 1000)
    assert base.seconds(batch) - raw.seconds(batch) == pytest.approx(2e-3)
    with_token = replace(RAW, token_s=DEFAULTS.token_s)
    assert Roofline(base.replica, with_token).seconds(batch) - raw.seconds(batch) == pytest.approx(
        64 * 0.3e-6
    )
    linked = replace(RAW, allreduce_latency_s=12e-6, allreduce_bandwidth_bytes_per_s=300e9)
    once = 12e-6 + 2 * 3 / 4 * 64 * 8192 * 2 / 300e9
    assert Roofline(base.replica, linked).seconds(batch) - raw.seconds(batch) == pytest.approx(
        160 * once
    )


def test_slow_links_bound_the_all_reduce() -> None:
    fast, slow = device("H100-SXM"), device("H100-PCIe")
    same = slow.model_copy(
        update={
            "memory_bandwidth_bytes_per_s": fast.memory_bandwidth_bytes_per_s,
            "peak_flop_per_s": fast.peak_flop_per_s,
        }
    )
    batch = prefill(8192)
    extra = Roofline(Replica(LLAMA_70B, same, 4)).seconds(batch) - Roofline(
        Replica(LLAMA_70B, fast, 4)
    ).seconds(batch)
    payload = 8192 * 8192 * 2
    assert extra == pytest.approx(160 * 1.5 * payload * (1 / (0.8 * 64e9) - 1 / 300e9))


def test_pipeline_of_one_sequence_idles_and_of_many_does_not() -> None:
    one, four = Replica(LLAMA_70B, H100, 2, 1), Replica(LLAMA_70B, H100, 2, 4)
    alone = Roofline(four, RAW).seconds(decode(1, 1000)) / Roofline(one, RAW).seconds(
        decode(1, 1000)
    )
    assert alone == pytest.approx(1)  # one token still passes every layer
    full = decode(64, 1000)
    # Each micro-batch reads the weights again, so the time of a step falls less than its cache.
    assert Roofline(four, RAW).seconds(full) < Roofline(one, RAW).seconds(full)


def test_latent_cache_is_copied_to_every_rank() -> None:
    assert Replica(LATENT, H100, 8).cache_copies == 8
    assert Replica(LLAMA_70B, H100, 8).cache_copies == 1
    assert Replica(SPARSE, H100, 8).cache_copies == 2


def test_capacity_is_what_the_weights_leave() -> None:
    tokens = Replica(LLAMA_70B, H100, 4).kv_capacity_tokens(0.9)
    left = 4 * (85520809984 * 0.9 - 4e9) - 141.1e9
    assert tokens == pytest.approx(left / 327680, rel=1e-2)
    with pytest.raises(Infeasible, match="take 2 devices"):
        Replica(LLAMA_70B, H100, 1).kv_capacity_tokens(0.9)


def test_weights_without_arithmetic_of_their_own_are_widened() -> None:
    assert compute_rate(H100, "fp8") == 1979e12
    assert compute_rate(H100, "mxfp4") == 989e12
    assert compute_rate(device("A100"), "fp8") == 312e12
    assert compute_rate(device("T4"), "bf16") == 65e12


def test_impossible_replicas_are_refused() -> None:
    with pytest.raises(BadInput, match="divisor of Llama"):
        Replica(LLAMA_70B, H100, 3)
    with pytest.raises(BadInput, match="1 to 80"):
        Replica(LLAMA_70B, H100, 1, 81)
    with pytest.raises(BadInput, match="fp7"):
        Precision("fp7")  # type: ignore[arg-type]


def test_step_cost_of_the_simulator_follows_the_roofline() -> None:
    roofline = Roofline(Replica(LLAMA_70B, H100, 4))
    linear = to_step_cost(roofline)
    between = [decode(24, 1500), decode(128, 700), prefill(1024), prefill(5000)]
    between += [StepBatch(32, 32 * 1000, 1, 2048, 2048**2 / 2)]
    for batch in between:
        assert linear.seconds(batch) == pytest.approx(roofline.seconds(batch), rel=0.25)
