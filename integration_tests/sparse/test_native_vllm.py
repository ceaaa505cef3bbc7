"""Models with native sparse attention that vLLM serves, against transformers without a cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from trimtab.core.errors import BadInput
from trimtab.hosts.vllm.own_attention import LayerSizes, Step
from trimtab.hosts.vllm.server import small_cpu_environment
from trimtab.sparse.config import NativeConfig
from trimtab.sparse.native import shape_of, use_native_attention
from trimtab.sparse.nsa import NSAAttention
from trimtab.sparse.paged_native import PagedNative, make
from trimtab.sparse.saving import load_native_model, save_native_model

pytestmark = pytest.mark.integration

NATIVE = NativeConfig(window=8, stride=4, block=16, top=5, first=1, recent=2, sliding=24)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SERVING = Path(__file__).with_name("native_serving.py")


def tokens(count, seed):
    return torch.randint(1, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


LONG = tokens(300, 0)
BATCHES = {
    "in chunks": [LONG, tokens(50, 1), tokens(7, 2), tokens(201, 3)],
    "known beginnings": [LONG, LONG[:170] + tokens(60, 4)],
    "too many for the cache": [tokens(150 + n, 10 + n) for n in range(4)],
    "one": [tokens(100, 20)],
}
"""Steps take 96 tokens at most; four answers of the third batch need 24 pages, and 23 are free."""


def scattered(model):
    """The model with other weights, so that no branch, gate or map is as it was made."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if "norm" in name else 0.15))
    return model


def native(kind=LlamaForCausalLM, config=LlamaConfig, options=NATIVE, **sizes):
    torch.manual_seed(0)
    model = kind(config(**SIZES | sizes))
    use_native_attention(model, options)
    return scattered(model)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The saved model, read back by transformers, and what vLLM said of each batch."""
    folder = tmp_path_factory.mktemp("native")
    save_native_model(native(), folder / "model")
    asked = [
        {"prompts": prompts, "judge_prompt": name == "in chunks"}
        for name, prompts in BATCHES.items()
    ]
    (folder / "batches.json").write_text(json.dumps(asked))
    names = [str(folder / name) for name in ("model", "batches.json", "said.json")]
    environment = os.environ | small_cpu_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [sys.executable, str(SERVING), *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = json.loads((folder / "said.json").read_text())
    return load_native_model(folder / "model"), dict(zip(BATCHES, said, strict=True))


def check(model, prompts, said):
    """Greedy tokens are the most likely ones without a cache, and as likely as vLLM says."""
    for number, prompt in enumerate(prompts):
        answer = said["answers"][number]
        with torch.no_grad():
            known = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        before = known[len(prompt) - 1 : -1]
        assert before.argmax(-1).tolist() == answer
        expected = before.gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(said["logprobs"][number]), expected, atol=2e-5, rtol=0
        )
        judged = said["prompt_logprobs"][number]
        if judged is not None:
            expected = known[: len(prompt) - 1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(judged), expected, atol=2e-5, rtol=0)


def test_prompts_in_chunks_and_their_answers_are_those_without_a_cache(served):
    model, said = served
    check(model, BATCHES["in chunks"], said["in chunks"])
    assert all(said["in chunks"]["prompt_logprobs"])


def test_beginnings_that_the_cache_knows_bring_their_entries(served):
    model, said = served
    check(model, BATCHES["known beginnings"], said["known beginnings"])
    assert said["known beginnings"]["cached"] == [288, 160]


def test_preempted_requests_give_the_same_answers(served):
    model, said = served
    check(model, BATCHES["too many for the cache"], said["too many for the cache"])
    assert said["too many for the cache"]["preemptions"] > said["known beginnings"]["preemptions"]


def test_a_decode_step_compresses_no_more_than_the_window_it_completes(served):
    """Over a whole request each window is compressed once in a layer, for keys and for values."""
    model, said = served
    check(model, BATCHES["one"], said["one"])
    steps, layers = said["one"]["steps"], SIZES["num_hidden_layers"]
    decoded = [step for step in steps if step[0] == 1]
    assert len(decoded) == 23 * layers
    for _, windows, keys, entries in decoded:
        assert windows == (keys % NATIVE.stride == 0)
        assert entries == 2 * windows
    total = sum(entries for *_, entries in steps)
    assert total == 2 * layers * shape_of(NATIVE).entries(100 + 23)


class Pages:
    """One layer's cache and pages of some requests, as vLLM would have them."""

    def __init__(self, module, page_tokens, requests, most):
        numbers = -(-module.page_numbers(page_tokens) // page_tokens) * page_tokens
        kv_heads = module._sizes.kv_heads
        order = torch.randperm(requests * most, generator=torch.Generator().manual_seed(3))
        self.cache = torch.full((requests * most, kv_heads, numbers), float("nan")).double()
        self.table, self.page_tokens = order.view(requests, most).int(), page_tokens

    def step(self, begins, stops, rotate):
        counts = [b - a for a, b in zip(begins, stops, strict=True)]
        ends = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        keys = torch.tensor(stops, dtype=torch.int32)
        return Step(self.table, ends, keys, self.page_tokens, rotate)


def rotate(positions):
    angle = positions[:, None] * torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)


@pytest.mark.parametrize("gate", ["token", "head"])
@pytest.mark.parametrize("compress", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("kv_per_branch", [True, False])
@pytest.mark.parametrize("page_tokens", [4, 64])
def test_every_kind_over_pages_is_the_module_that_trains(
    gate, compress, kv_per_branch, page_tokens
):
    """Two requests, in steps that cut them anywhere, and on two tensor-parallel ranks."""
    torch.manual_seed(0)
    options = NATIVE.model_copy(
        update={"gate": gate, "compress": compress, "kv_per_branch": kv_per_branch}
    )
    choices = {"gate": gate, "compress": compress, "kv_per_branch": kv_per_branch, "bias": True}
    trained = scattered(NSAAttention(20, 4, 2, 8, 8, shape_of(options), **choices).double())
    state = trained.state_dict()
    hidden = torch.randn(2, 150, 20, dtype=torch.float64)
    with torch.no_grad():
        expected = trained(hidden, rotate(torch.arange(150)))
        found = torch.zeros(2, 150, 32, dtype=torch.float64)
        for rank in range(2):
            module = PagedNative(options, LayerSizes(20, 2, 1, 8), bias=True).double()
            for name, parameter in module.named_parameters():
                dim, whole = module.sharded.get(name), state[name]
                parameter.copy_(whole if dim is None else whole.chunk(2, dim)[rank])
            pages, done = Pages(module, page_tokens, 2, -(-150 // page_tokens)), (0, 0)
            for stops in ((1, 90), (2, 91), (45, 96), (46, 140), (150, 150)):
                plan = module.plan(pages.step(done, stops, rotate))
                rows = [hidden[n, a:b] for n, (a, b) in enumerate(zip(done, stops, strict=True))]
                new = torch.cat(rows)
                q, k, v = (
                    getattr(trained, f"{name}_proj")(new).view(len(new), -1, 8).chunk(2, 1)[rank]
                    for name in "qkv"
                )
                out = module.attend(new, q, k, v, pages.cache, plan).flatten(1)
                begin = 0
                for n, (a, b) in enumerate(zip(done, stops, strict=True)):
                    found[n, a:b, 16 * rank : 16 * rank + 16] = out[begin : begin + b - a]
                    begin += b - a
                done = stops
        torch.testing.assert_close(trained.o_proj(found), expected)


@pytest.mark.parametrize(
    ("kind", "config", "sizes"),
    [
        (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
        (LlamaForCausalLM, LlamaConfig, {"attention_bias": True}),
        (Qwen2ForCausalLM, Qwen2Config, {}),
    ],
)
def test_a_saved_model_comes_back_as_it_was(tmp_path, kind, config, sizes):
    options = NATIVE.model_copy(update={"kv_per_branch": True, "compress": "mlp"})
    model = native(kind, config, options, **sizes)
    save_native_model(model, tmp_path)
    back = load_native_model(tmp_path)
    prompt = torch.tensor([LONG[:90]])
    with torch.no_grad():
        assert torch.equal(back(prompt).logits, model.eval()(prompt).logits)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["TrimtabNativeLlamaForCausalLM"]
    assert NativeConfig(**written["trimtab_native"]) == options
    biased = "attention_bias" in sizes
    assert written["attention_bias"] == biased
    assert written["qkv_bias"] == (biased or kind is Qwen2ForCausalLM)


def test_what_cannot_be_saved_or_served_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(BadInput, match="LlamaForCausalLM has no native sparse attention"):
        save_native_model(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path)
    model = native()
    with pytest.raises(BadInput, match="LlamaModel has no head for language"):
        save_native_model(model.model, tmp_path)
    model.config.model_type = "smollm3"
    with pytest.raises(BadInput, match="is of the type smollm3"):
        save_native_model(model, tmp_path)
    model.model.layers[0].self_attn.config = NATIVE.model_copy(update={"top": 6})
    with pytest.raises(BadInput, match="several kinds"):
        save_native_model(model, tmp_path)
    sizes = LayerSizes(64, 4, 2, 16)
    with pytest.raises(BadInput, match=r"trimtab_native: the model has no native sparse attention"):
        make(SimpleNamespace(), sizes)
    with pytest.raises(BadInput, match=r"config\.json: trimtab_native.*windows"):
        make(SimpleNamespace(trimtab_native={"windows": 8}), sizes)
    module = make(SimpleNamespace(trimtab_native=NATIVE.model_dump()), sizes)
    with pytest.raises(BadInput, match=r"pages of 10 tokens.*multiple of 4"):
        module.page_numbers(10)


def test_one_process_alone_writes(tmp_path):
    save_native_model(native(), tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("config.json"))


def test_missing_weights_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    save_native_model(native(), tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    weights = load_file(path)
    del weights["model.layers.1.self_attn.gate_proj.weight"]
    save_file(weights, path)
    with pytest.raises(BadInput, match=r"no weights for model\.layers\.1\.self_attn\.gate_proj"):
        load_native_model(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"there is no config\.json; give the folder"):
        load_native_model(tmp_path / "nowhere")


@pytest.fixture
def changed(tmp_path):
    """Saves a model, changes its config.json and its weights, and reads it back."""

    def change(options, config=(), weights=None, **made):
        from safetensors.torch import load_file, save_file

        save_native_model(native(options=NATIVE.model_copy(update=made)), tmp_path)
        path = tmp_path / "config.json"
        written = {**json.loads(path.read_text()), **dict(config)}
        written["trimtab_native"] |= options
        path.write_text(json.dumps(written))
        (file,) = tmp_path.glob("*.safetensors")
        if weights:
            save_file({**load_file(file), **weights}, file)
        return load_native_model(tmp_path)

    return change


@pytest.mark.parametrize(
    ("made", "given", "said"),
    [
        ({}, {"gate": "token"}, "gate is 'token', but the weights .* with 'head'; give 'head'"),
        ({"gate": "token"}, {"gate": "head"}, "gate is 'head', .* with 'token'; give 'token'"),
        ({}, {"window": 16}, "window is 16, .* with 8; give 8"),
        ({}, {"compress": "mean"}, "compress is 'mean', .* with 'linear'"),
        ({"compress": "mean"}, {"compress": "mlp"}, "compress is 'mlp', .* with 'mean'"),
        ({"compress": "mlp"}, {"compress": "linear"}, "compress is 'linear', .* with 'mlp'"),
        ({}, {"kv_per_branch": True}, "kv_per_branch is True, .* with False; give False"),
        ({"kv_per_branch": True}, {"kv_per_branch": False}, "kv_per_branch is False, .* True"),
    ],
)
def test_an_option_that_does_not_fit_the_weights_is_named_with_what_would(
    changed, made, given, said
):
    with pytest.raises(BadInput, match=rf"config\.json: trimtab_native: {said}"):
        changed(given, **made)


def test_options_that_weights_do_not_tell_of_may_be_changed(changed):
    other = {"top": 4, "sliding": 16, "stride": 8}
    model = changed(other)
    assert model.model.layers[1].self_attn.config == NATIVE.model_copy(update=other)


def test_weights_of_another_size_and_unknown_ones_are_named(changed):
    what = r"model\.layers\.0\.mlp\.down_proj\.weight is \[64, 96\], and config\.json makes it"
    with pytest.raises(BadInput, match=rf"{what} \[64, 80\]; save"):
        changed({}, {"intermediate_size": 80})
    with pytest.raises(BadInput, match=r"no layer takes model\.layers\.0\.self_attn\.gates;"):
        changed({}, weights={"model.layers.0.self_attn.gates": torch.zeros(3)})


def test_transformers_alone_does_not_read_a_saved_model_as_a_dense_one(tmp_path):
    """In a process that knows nothing of trimtab; who wants it dense can say so."""
    save_native_model(native(), tmp_path)
    code = (
        "from transformers import AutoModelForCausalLM as auto\n"
        f"folder = {str(tmp_path)!r}\n"
        "try:\n"
        "    auto.from_pretrained(folder)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "print(type(auto.from_pretrained(folder, attn_implementation='sdpa')).__name__)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    refused, dense = ran.stdout.splitlines()
    assert '`attn_implementation="trimtab_native_sparse"` is not supported' in refused
    assert dense == "LlamaForCausalLM"
