"""What a DeepSpeed configuration switches on, what is wrong in one, and ranks that train so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from trimtab.core.errors import BadInput
from trimtab.core.hooks import plugin
from trimtab.hosts.deepspeed.config import TrainingBlock, training_plugins
from trimtab.sparse.native import NativeAttention

pytestmark = pytest.mark.integration

NATIVE = {"window": 8, "stride": 4, "block": 16, "top": 3, "recent": 1, "sliding": 24}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 50,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def test_the_block_switches_it_on_with_its_sizes_once():
    model = llama()
    plugin("sparse").change_model({"native": NATIVE}, model, None)
    layer = model.model.layers[0].self_attn
    assert isinstance(layer, NativeAttention)
    assert (layer.shape.window, layer.shape.top, layer.shape.sliding) == (8, 3, 24)
    plugin("sparse").change_model({}, model, None)
    assert model.model.layers[0].self_attn is layer


def test_a_model_may_be_part_of_another_module():
    model = llama()
    plugin("sparse").change_model({"native": NATIVE}, torch.nn.ModuleDict({"policy": model}), None)
    assert isinstance(model.model.layers[0].self_attn, NativeAttention)
    assert not model.config.use_cache
    assert model(torch.arange(40)[None]).logits.isfinite().all()


class Bare(torch.nn.Module):
    """Has the projections of an attention layer, and no transformers model around it."""

    def __init__(self):
        super().__init__()
        self.attention = llama().model.layers[0].self_attn


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.nn.Linear(2, 2), "Linear has no attention layer with q_proj, k_proj"),
        (Bare, "Bare holds no model of transformers"),
        (lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)), "Attention has k_norm, q_norm beside"),
    ],
)
def test_models_of_another_kind_are_named_beside_the_supported_ones(make, what):
    model = make()
    before = [id(module) for module in model.modules()]
    with pytest.raises(BadInput, match=what) as caught:
        plugin("sparse").change_model({"native": NATIVE}, model, None)
    assert "with the attention of Llama, Mistral or Qwen2" in str(caught.value)
    assert [id(module) for module in model.modules()] == before


@pytest.mark.parametrize(
    ("native", "what"),
    [
        ({"window": 30}, "stride 16 must divide window 30"),
        ({"block": 48}, "power of two"),
        ({"gates": 1}, "gates"),
    ],
)
def test_wrong_options_are_named_with_their_place(native, what):
    with pytest.raises(BadInput, match=what) as caught:
        training_plugins(TrainingBlock({"sparse": {"native": native}}, "ds.json"))
    assert "ds.json, trimtab.sparse" in str(caught.value)


def test_a_launch_takes_the_block():
    ((found, _),) = training_plugins(TrainingBlock({"sparse": {}}, "ds.json"))
    assert found.name == "sparse"
    assert found.trains


def test_ranks_are_as_one_alone(tmp_path):
    """Two and four of them, by ZeRO's stages, and where they share sequences (Ulysses)."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("native_rank.py"), tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=240,
    )
    runs = {"2 ranks": {}, "4 ranks": {}}
    for line in done.stdout.splitlines():
        name, colon, figures = line.rpartition(": ")
        if colon and name.startswith("losses, "):
            _, ranks, run = name.split(", ", 2)
            layers, *losses = figures.split()
            runs[ranks][run] = int(layers), [float(one) for one in losses]
    shared = {f"ZeRO {stage}, shared by 2" for stage in (2, 3)}
    stages = {f"ZeRO {stage}" for stage in range(4)}
    assert set(runs["2 ranks"]) == {"alone", "zero.Init"} | stages | shared
    shared = {"ZeRO 1, shared by 4", "ZeRO 2, shared by 2"}
    assert set(runs["4 ranks"]) == {"alone"} | shared
    for found in runs.values():
        _, alone = found["alone"]
        assert alone[-1] < 0.99 * alone[0]
        for layers, losses in found.values():
            assert layers == 2
            assert losses == pytest.approx(alone, rel=2e-6)
