"""A real vLLM server on the CPU with sparse prefill, beside one without."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from trimtab.core.errors import BadInput
from trimtab.hosts.vllm.attention import TrimtabCpuAttention
from trimtab.hosts.vllm.prefills import LayerShape, prefiller
from trimtab.hosts.vllm.server import Server, running, small_cpu_environment
from trimtab.hosts.vllm.small_model import small_model
from trimtab.kernels.sparse import prefill
from trimtab.sparse.vllm_prefill import make

pytestmark = pytest.mark.integration

PAGE_BYTES = 30 * 128 * 2 * 3 * 64 * 4
"""A page of 128 tokens in all layers of the small model, in float32."""

ENGINE = (
    *("--max-model-len", "1024", "--max-num-batched-tokens", "512", "--max-num-seqs", "4"),
    *("--dtype", "float32", "--kv-cache-memory-bytes", str(12 * PAGE_BYTES)),
    "--enforce-eager",
)
"""Prompts come in chunks, and two of them with their answers do not fit the cache: one waits or is
preempted."""

ALL_BLOCKS = {"sparse": {"selector": "top", "top": 1000, "min_prompt": 128, "least_gain": 0}}
"""Everything goes through the block path, and nothing is left out."""

TEXT = (Path(__file__).parents[2] / "docs" / "design.md").read_text()
PROMPTS = [
    TEXT[at : at + length] for at, length in ((0, 2300), (900, 2300), (3000, 300), (500, 1500))
]


def ask(server, prompt):
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answer = client.completions.create(model="model", prompt=prompt, max_tokens=24, temperature=0)
    return answer.choices[0].text


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """One with sparse prefill of all blocks, one as vLLM is."""
    folder = tmp_path_factory.mktemp("logs")
    started = []
    for name, plugins in (("sparse", ALL_BLOCKS), ("plain", {})):
        arguments = [*ENGINE, "--additional-config", json.dumps({"trimtab": plugins})]
        if plugins:
            arguments += ["--attention-backend", "CUSTOM"]
        log = folder / f"{name}.log"
        started.append(Server(small_model(), log, arguments, small_cpu_environment()))
    with running(started) as servers:
        yield servers


@pytest.fixture(scope="module")
def plain_texts(servers):
    return [ask(servers[1], prompt) for prompt in PROMPTS]


def test_prompts_in_chunks_get_the_texts_of_dense_attention(servers, plain_texts):
    assert [ask(servers[0], prompt) for prompt in PROMPTS] == plain_texts
    assert "sparse prefill of" in servers[0].log.read_text()
    assert "sparse prefill of" not in servers[1].log.read_text()


def test_prompts_that_the_cache_knows_and_several_at_once_get_them_too(servers, plain_texts):
    with ThreadPoolExecutor(len(PROMPTS)) as crowd:
        together = list(crowd.map(lambda prompt: ask(servers[0], prompt), PROMPTS))
    assert together == plain_texts
    longer = PROMPTS[0] + TEXT[2300:2600]
    assert ask(servers[0], longer) == ask(servers[1], longer)


def test_preempted_prompts_are_filled_in_again_and_get_the_answers_of_dense_attention(tmp_path):
    """Four prompts fit the 18 free pages, and with their answers need 20."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 96, "vocab_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=512)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)  # so that no two answers are near
    model.save_pretrained(tmp_path / "model")
    prompts = torch.randint(1, 128, (4, 250), generator=torch.Generator().manual_seed(1))
    (tmp_path / "prompts.json").write_text(json.dumps(prompts.tolist()))
    names = [str(tmp_path / name) for name in ("model", "prompts.json", "said.json")]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("preempted_serving.py"), *names],
        env=os.environ | small_cpu_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = json.loads((tmp_path / "said.json").read_text())
    alone, together = said["alone"], said["together"]
    assert alone["preemptions"] == 0
    assert together["preemptions"] > 0
    assert len(together["taken"]) > len(alone["taken"]) > 0
    assert max(keys for _, keys in alone["taken"]) == 250
    assert max(keys for _, keys in together["taken"]) > 250  # a prompt and what was answered
    answers = torch.tensor(together["answers"])
    assert together["answers"] == alone["answers"]
    with torch.no_grad():
        known = model(torch.cat([prompts, answers], 1)).logits[:, 249:-1]
    assert torch.equal(known.argmax(-1), answers)


def test_a_wrong_option_is_named_before_a_layer_is_made():
    with pytest.raises(BadInput, match=r"trimtab\.sparse.*selector.*best"):
        prefiller({"trimtab": {"sparse": {"selector": "best"}}})
    assert prefiller({"trimtab": {}}) is None
    assert prefiller({}) is None


def layers(page):
    return LayerShape(9, 3, 64, page, 0, "CPU_ATTN")


def test_short_chunks_odd_pages_and_full_shares_are_left_to_vllm():
    usual = make({})
    assert usual.wants(4096, 4096, layers(128))
    assert not usual.wants(4096, 4096, layers(96))
    assert not usual.wants(1, 4096, layers(128))
    assert not usual.wants(1024, 1024, layers(128))
    assert not make({"mass": 1}).wants(4096, 4096, layers(128))


def test_prompts_that_stay_dense_for_want_of_compiled_code_are_told_of_once(monkeypatch, caplog):
    monkeypatch.setattr(prefill, "library", lambda: None)
    log = logging.getLogger("vllm.trimtab.sparse")
    monkeypatch.setattr(log, "propagate", False)  # vLLM's own logger may be captured too
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    caplog.set_level(logging.INFO, log.name)
    usual = make({})
    assert not usual.wants(4096, 4096, layers(128))
    assert not usual.wants(8192, 8192, layers(128))
    (line,) = caplog.messages
    assert line.startswith("a prefill of 4096 tokens is left to vLLM (dense: ")
    assert "no compiled code was loaded" in line


def test_caches_that_are_not_the_layers_own_are_left_to_vllm():
    config = EngineArgs(
        model=str(small_model()),
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        additional_config={"trimtab": ALL_BLOCKS},
    ).create_engine_config()
    usual = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
    for given, why in (
        ({}, ""),
        ({"kv_cache_dtype": "float32"}, ""),
        ({"kv_cache_dtype": "bfloat16"}, "a cache in bfloat16"),
        ({"kv_cache_dtype": "fp8"}, "a cache in fp8"),
        ({"kv_sharing_target_layer_name": "another"}, "a cache of another layer"),
    ):
        with set_current_vllm_config(config):
            layer = TrimtabCpuAttention.get_impl_cls()(9, 64, 0.125, 3, **(usual | given))
        assert layer._refusal == why
