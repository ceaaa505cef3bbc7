"""Model shapes against what vendors publish, and against sums done the slow way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trimtab.core.errors import BadInput, Unsupported
from trimtab.core.model import Experts, ModelSpec

CONFIGS = json.loads(Path(__file__).with_name("hf_configs.json").read_text())


def spec(name: str) -> ModelSpec:
    return ModelSpec.from_hf(CONFIGS[name], name=name)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As summed over the published checkpoints.
        ("Llama-3.1-8B", 8_030_261_248),
        ("Llama-3.1-70B", 70_553_706_496),
        ("Llama-3.1-405B", 405_853_388_800),
        ("SmolLM2-135M", 134_515_008),
        ("Mistral-7B", 7_241_732_096),
        ("Mixtral-8x7B", 46_702_792_704),
        ("Qwen2.5-7B", 7_615_616_512),
        ("Qwen1.5-MoE-A2.7B", 14_315_784_192),
        ("DeepSeek-V2-Lite", 15_706_484_224),
        ("gemma-2-9b", 9_241_705_984),
        ("gemma-3-1b", 999_885_952),
        ("Phi-3-mini", 3_821_079_552),
    ],
)
def test_parameters_are_exactly_those_of_the_checkpoint(name, parameters):
    assert spec(name).parameters() == parameters


@pytest.mark.parametrize(
    ("name", "billions", "active_billions"),
    [
        # As the model cards round them.
        ("Qwen3-0.6B", 0.6, 0.6),
        ("Qwen3-8B", 8.2, 8.2),
        ("Qwen3-32B", 32.8, 32.8),
        ("Qwen3-30B-A3B", 30.5, None),
        ("Qwen3-235B-A22B", 235, 22),
        ("Mixtral-8x7B", 46.7, 12.9),
        ("Mixtral-8x22B", 141, 39),
        ("DeepSeek-V3", 671, None),
        ("gpt-oss-20b", 20.9, None),
        ("gpt-oss-120b", 116.8, None),
        ("Qwen1.5-MoE-A2.7B", 14.3, 2.7),
    ],
)
def test_parameters_are_within_1_percent_of_the_model_card(name, billions, active_billions):
    model = spec(name)
    assert model.parameters() / 1e9 == pytest.approx(billions, rel=0.01)
    if active_billions is not None:
        assert model.active_parameters() / 1e9 == pytest.approx(active_billions, rel=0.01)


@pytest.mark.parametrize(
    ("name", "embedding", "active_billions"),
    [
        ("Qwen3-30B-A3B", True, 3.35),  # "3.3B"
        ("DeepSeek-V3", False, 36.7),  # the repository's README_WEIGHTS
        ("gpt-oss-20b", False, 3.61),  # arXiv:2508.10925, table 1
        ("gpt-oss-120b", False, 5.13),  # the same
    ],
)
def test_vendors_differ_in_whether_the_input_table_is_active(name, embedding, active_billions):
    active = spec(name).active_parameters(embedding=embedding)
    assert active / 1e9 == pytest.approx(active_billions, rel=0.01)


def test_the_kv_cache_of_a_token():
    assert spec("Llama-3.1-8B").kv_bytes_per_token() == 128 * 1024
    assert spec("Llama-3.1-70B").kv_bytes_per_token(1) == 160 * 1024
    # The compressed latent: 61 layers of 512 + 64 values (arXiv:2412.19437).
    assert spec("DeepSeek-V3").kv_bytes_per_token() == 61 * 576 * 2


def test_sliding_layers_keep_no_more_than_their_window():
    gemma = spec("gemma-2-9b")
    assert len(gemma.sliding_layers) == 21
    layer = gemma.layer_kv_bytes_per_token()
    assert gemma.kv_bytes(1000) == 1000 * gemma.kv_bytes_per_token()
    assert gemma.kv_bytes(10_000) == (21 * 4096 + 21 * 10_000) * layer
    assert len(spec("gemma-3-1b").sliding_layers) == 22
    assert len(spec("Mistral-7B").sliding_layers) == 32
    assert spec("Qwen2.5-7B").sliding_window is None
    assert len(spec("gpt-oss-20b").sliding_layers) == 12


def test_stored_bytes_follow_the_quantisation():
    assert spec("Llama-3.1-8B").weight_bytes() == 2 * 8_030_261_248
    assert spec("Llama-3.1-8B").weight_bytes(0.5) == 8_030_261_248 / 2
    assert spec("DeepSeek-V3").dtype_bytes == 1
    assert spec("gpt-oss-20b").dtype_bytes == 4.25 / 8
    awq = CONFIGS["Llama-3.1-8B"] | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    assert ModelSpec.from_hf(awq).dtype_bytes == 0.5


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_embedding_and_head_sum_to_the_model(name):
    model = spec(name)
    layers = sum(model.layer_parameters(layer) for layer in range(model.layers))
    assert model.embedding_parameters + layers + model.head_parameters == model.parameters()
    assert sum(map(model.layer_weight_bytes, range(model.layers))) == layers * model.dtype_bytes


@given(st.sampled_from(sorted(CONFIGS)), st.integers(1, 40), st.integers(0, 40))
def test_prefill_counts_what_one_token_after_another_would(name, tokens, context):
    model = spec(name).model_copy(update={"sliding_window": 16})
    head = 2 * model.vocab * model.hidden
    if model.latent is None:
        one_by_one = sum(model.decode_flops(context + i) for i in range(1, tokens + 1))
        assert model.prefill_flops(tokens, context) == pytest.approx(
            one_by_one - (tokens - 1) * head
        )
    else:
        heads = model.heads * (128 + 64 + 128) * 2
        pairs = sum(context + i for i in range(1, tokens + 1))
        body = model.active_parameters(embedding=False) - model.head_parameters
        assert model.prefill_flops(tokens, context) == pytest.approx(
            2 * tokens * body + model.layers * heads * pairs + head
        )


def test_flops_agree_with_vllms_own_count():
    # vLLM 0.32's vllm.v1.metrics.perf on this config: 32 decodes at a context of 1000 are 4.53
    # TFLOP; a prompt of 2455 tokens is 351.9 TFLOP with attention that is not causal.
    model = spec("Llama-3.1-70B")
    assert 32 * model.decode_flops(1000) == pytest.approx(4.53e12, rel=0.002)
    future_pairs = 2455 * 2454 / 2
    unmasked = model.prefill_flops(2455) + 4 * 64 * 128 * 80 * future_pairs
    assert unmasked == pytest.approx(351.9e12, rel=0.001)


def test_touched_parameters_go_from_active_to_all():
    model = spec("Mixtral-8x7B")
    assert model.touched_parameters(1) == model.active_parameters(embedding=False)
    touched = [model.touched_parameters(tokens) for tokens in range(1, 50)]
    assert touched == sorted(touched)
    assert touched[-1] == pytest.approx(model.parameters() - model.embedding_parameters, rel=1e-4)
    dense = spec("Llama-3.1-8B")
    assert dense.touched_parameters(7) == dense.active_parameters(embedding=False)


def test_which_layers_are_sparse():
    deepseek = spec("DeepSeek-V3")
    assert [deepseek.is_sparse(layer) for layer in (0, 2, 3, 60)] == [False, False, True, True]
    stepped = CONFIGS["Qwen3-30B-A3B"] | {"decoder_sparse_step": 2, "mlp_only_layers": [1]}
    qwen = ModelSpec.from_hf(stepped)
    assert [qwen.is_sparse(layer) for layer in range(5)] == [False, False, False, True, False]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_spec_survives_json(name):
    model = spec(name)
    assert ModelSpec.model_validate_json(model.model_dump_json()) == model


def written(tmp_path: Path, config: object) -> Path:
    folder = tmp_path / "Some-Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def test_a_config_is_read_from_its_file_or_folder(tmp_path):
    folder = written(tmp_path, CONFIGS["Qwen3-8B"] | {"time_step_limit": [0, float("inf")]})
    model = ModelSpec.from_hf(folder)
    assert model.name == "Some-Model"
    assert model == ModelSpec.from_hf(str(folder / "config.json"))
    assert ModelSpec.from_hf(CONFIGS["Qwen3-8B"]).name == "qwen3"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "mamba"}, ":2: the architecture 'mamba' is not known; known are deepseek"),
        ({"model_type": None}, ": there is no model_type; give the config.json of a Hugging Face"),
        ({"hidden_size": -1}, ":3: hidden_size is -1; it should be greater than 0."),
        ({"num_hidden_layers": None}, ":4: num_hidden_layers is None; it should be a valid integ"),
        ({"num_experts": None}, ":5: num_experts is missing; every qwen3_moe model has it."),
        ({"num_key_value_heads": 5}, ": kv_heads is 5; it must divide the 32 heads."),
        ({"num_experts_per_tok": 500}, ": experts.active is 500; there are 128 experts."),
    ],
)
def test_a_fault_in_a_config_is_one_sentence(tmp_path, change, expected):
    first = ("model_type", "hidden_size", "num_hidden_layers", "num_experts")
    config = CONFIGS["Qwen3-30B-A3B"]
    ordered = {key: config[key] for key in first} | config | change
    folder = written(tmp_path, ordered)
    with pytest.raises(BadInput) as caught:
        ModelSpec.from_hf(folder)
    assert str(caught.value).startswith(f"{folder / 'config.json'}{expected}")
    assert isinstance(caught.value, Unsupported) == ("architecture" in expected)


def test_a_config_that_is_missing_or_no_mapping_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="there is no such file"):
        ModelSpec.from_hf(tmp_path / "gone.json")
    with pytest.raises(BadInput, match="there is no model_type"):
        ModelSpec.from_hf(written(tmp_path, [1]))


def test_a_spec_is_immutable_and_consistent():
    model = spec("Mixtral-8x7B")
    with pytest.raises(ValidationError):
        model.layers = 3
    assert isinstance(model.experts, Experts)
    assert hash(model) == hash(spec("Mixtral-8x7B"))
