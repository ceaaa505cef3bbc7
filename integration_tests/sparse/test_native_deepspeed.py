"""What a DeepSpeed configuration switches on, what is wrong in one, and sequences on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.core.errors import BadInput
from trimtab.hosts.deepspeed.config import TrainingBlock, training_plugins
from trimtab.sparse.in_deepspeed import configured, prepare
from trimtab.sparse.native import NativeAttention

pytestmark = pytest.mark.integration

NATIVE = {"window": 8, "stride": 4, "block": 16, "top": 3, "recent": 1, "sliding": 24}


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 50, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def test_the_block_switches_it_on_with_its_sizes():
    model = llama()
    assert prepare(model, {"trimtab": {"sparse": {"native": NATIVE}}})
    layer = model.model.layers[0].self_attn
    assert isinstance(layer, NativeAttention)
    assert (layer.shape.window, layer.shape.top, layer.shape.sliding) == (8, 3, 24)


@pytest.mark.parametrize("config", [{}, {"trimtab": {}}, {"trimtab": {"gentree": {}}}])
def test_without_the_block_the_model_is_left_alone(config):
    model = llama()
    assert not prepare(model, config)
    assert not isinstance(model.model.layers[0].self_attn, NativeAttention)


def test_the_configuration_of_the_arguments_is_found(tmp_path, monkeypatch):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"trimtab": {"sparse": {"native": NATIVE}}}))
    monkeypatch.setattr(sys, "argv", ["train.py", "--deepspeed_config", str(path)])
    found = configured()
    assert found is not None
    assert found.native.block == 16
    assert configured(path) == found


@pytest.mark.parametrize(
    ("native", "what"),
    [
        ({"window": 30}, "stride 16 must divide window 30"),
        ({"block": 48}, "power of two"),
        ({"gates": 1}, "gates"),
    ],
)
def test_wrong_options_are_named_with_their_place(native, what):
    config = {"trimtab": {"sparse": {"native": native}}}
    with pytest.raises(BadInput, match=what) as caught:
        configured(config)
    assert "DeepSpeed configuration, trimtab.sparse" in str(caught.value)
    with pytest.raises(BadInput, match=what):
        training_plugins(TrainingBlock(config["trimtab"], "ds.json"))


def test_a_launch_takes_the_block():
    ((plugin, _),) = training_plugins(TrainingBlock({"sparse": {}}, "ds.json"))
    assert plugin.name == "sparse"
    assert plugin.trains


def test_ranks_that_share_sequences_are_as_one_alone():
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).with_name("ulysses_rank.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *torchrun, str(script)], env=environment, check=True, timeout=240
    )
