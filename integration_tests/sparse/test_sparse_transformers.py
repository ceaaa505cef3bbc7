"""Sparse prefill in transformers, on a small random model."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AttentionInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from trimtab.core.errors import BadInput
from trimtab.sparse import SparseConfig, in_transformers
from trimtab.sparse.in_transformers import register

pytestmark = pytest.mark.integration

ALL_BLOCKS = SparseConfig(selector="top", top=1000, min_prompt=64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 200}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0)).eval()


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(1, 200, (1, 300), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, name, ids, **options):
    model.set_attn_implementation(name)
    return model(ids, **options).logits


def test_all_blocks_give_the_logits_of_dense_attention(model, prompt):
    kept = []
    ours = logits(model, register(ALL_BLOCKS, kept.append), prompt)
    torch.testing.assert_close(ours, logits(model, "sdpa", prompt), atol=1e-4, rtol=1e-4)
    assert kept == [1.0, 1.0]


def test_fewer_blocks_change_late_tokens_and_leave_the_first_tiles_alone(model, prompt):
    few = SparseConfig(selector="top", top=1, first=0, recent=1, min_prompt=64)
    ours, dense = logits(model, register(few), prompt), logits(model, "sdpa", prompt)
    torch.testing.assert_close(ours[:, :64], dense[:, :64], atol=1e-4, rtol=1e-4)
    assert (ours[:, 200:] - dense[:, 200:]).abs().max() > 1e-3


def test_generation_decodes_densely(model, prompt):
    kept = []
    model.set_attn_implementation(register(ALL_BLOCKS, kept.append))
    ours = model.generate(prompt, max_new_tokens=5, do_sample=False)
    assert len(kept) == 2
    model.set_attn_implementation("sdpa")
    assert torch.equal(ours, model.generate(prompt, max_new_tokens=5, do_sample=False))


def test_generation_with_a_static_cache_has_the_logits_of_dense_attention(model, prompt):
    answers, kept = [], []
    options = {"cache_implementation": "static", "disable_compile": True, "output_logits": True}
    for name in ("sdpa", register(ALL_BLOCKS, kept.append)):
        model.set_attn_implementation(name)
        told = model.generate(
            prompt, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, **options
        )
        answers.append(torch.stack(told.logits))
    torch.testing.assert_close(answers[1], answers[0], atol=1e-4, rtol=1e-4)
    assert kept == [1.0, 1.0]


@pytest.mark.parametrize("parts", [(300,), (150, 150), (100, 1, 199)])
@pytest.mark.parametrize("slots", [None, 300, 512])
def test_caches_filled_at_once_and_in_parts_give_dense_logits(model, prompt, slots, parts):
    found, kept = [], []
    for name in ("sdpa", register(ALL_BLOCKS, kept.append)):
        cache = StaticCache(model.config, max_cache_len=slots) if slots else DynamicCache()
        runs = [logits(model, name, ids, past_key_values=cache) for ids in prompt.split(parts, 1)]
        found.append(torch.cat(runs, 1))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    assert kept[:2] == [1.0, 1.0]


def test_padded_and_several_and_short_prompts_stay_dense(model, prompt):
    kept = []
    name = register(ALL_BLOCKS, kept.append)
    padded = torch.ones_like(prompt)
    padded[:, :40] = 0
    for ids, options in (
        (prompt, {"attention_mask": padded}),
        (prompt.repeat(2, 1), {}),
        (prompt[:, :63], {}),
    ):
        dense = logits(model, "sdpa", ids, **options)
        torch.testing.assert_close(logits(model, name, ids, **options), dense)
    assert kept == []


def test_training_stays_dense_and_has_gradients(model, prompt):
    kept = []
    model.set_attn_implementation(register(ALL_BLOCKS, kept.append))
    model(prompt, labels=prompt).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert kept == []


@pytest.fixture
def said(monkeypatch, caplog):
    monkeypatch.setattr(in_transformers, "_said", set())
    return lambda: [r.getMessage() for r in caplog.records if r.name == "trimtab"]


def padding(length):
    mask = torch.ones(1, length, dtype=torch.int64)
    mask[:, :40] = 0
    return mask


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attention_mask": padding(300)}, "a mask (of padding"),
        ({"attention_mask": torch.ones(1, 1, 300, 300).tril(-1).bool()}, "a mask (of padding"),
        ({"attention_mask": torch.zeros(1, 1, 300, 300)}, "a mask (of padding"),
        (
            {"position_ids": (torch.arange(300) % 150)[None], "use_cache": False},
            "a mask (of padding, packed prompts",
        ),
    ],
)
def test_a_mask_is_named_as_what_attention_is_dense_for_once(model, prompt, said, options, reason):
    name = register(ALL_BLOCKS)
    for _ in range(2):
        logits(model, name, prompt, **options)
    (line,) = said()
    assert "attention is dense" in line
    assert reason in line


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"sliding_window": 32}, "a sliding window"),
        ({"softcap": 30.0}, "a soft cap"),
        ({"position_bias": torch.zeros(1, 2, 100, 100)}, "a bias of positions"),
        ({"is_causal": False}, "attention that is not causal"),
        ({"device": "meta"}, "the device meta"),
        ({"batch": 2}, "several prompts in a batch"),
        ({"requires_grad": True}, "gradients (torch.no_grad() goes without)"),
    ],
)
def test_what_attention_is_dense_for_is_named_once(said, options, reason):
    attend = AttentionInterface()[register(ALL_BLOCKS)]
    options = dict(options)
    made = {key: options.pop(key) for key in ("device", "requires_grad") if key in options}
    x = torch.zeros(options.pop("batch", 1), 2, 100, 16, **made)
    for _ in range(2):
        attend(torch.nn.Module(), x, x, x, None, **options)
    (line,) = said()
    assert reason in line


@pytest.mark.parametrize("by", ["tile", "query"])
@pytest.mark.parametrize("slots", [None, 512])
@pytest.mark.parametrize("cut", [64, 150])
def test_later_parts_of_a_prompt_are_sparse_too(model, prompt, said, slots, cut, by):
    some = SparseConfig(mass=0.5, first=0, recent=1, min_prompt=64, by=by)
    kept, found = [], []
    name = register(some, kept.append)
    for parts in ((300,), (cut, 300 - cut)):
        cache = StaticCache(model.config, max_cache_len=slots) if slots else DynamicCache()
        runs = [logits(model, name, ids, past_key_values=cache) for ids in prompt.split(parts, 1)]
        found.append(torch.cat(runs, 1))
    assert len(kept) == 2 + 4
    assert max(kept[4:]) < 1
    assert said() == []
    if by == "query" or cut % 64 == 0:
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_generation_that_fills_in_by_parts_is_sparse_in_each(model, prompt, said):
    some = SparseConfig(mass=0.5, first=0, recent=1, min_prompt=128, by="query")
    kept, answers = [], []
    model.set_attn_implementation(register(some, kept.append))
    for options in ({}, {"prefill_chunk_size": 128}):
        options = {**options, "max_new_tokens": 6, "do_sample": False}
        answers.append(model.generate(prompt, **options))
    assert torch.equal(*answers)
    assert len(kept) == 2 + 2 * 2  # the last 43 or 44 tokens are too few
    assert max(kept[4:]) < 1
    assert said() == []


def test_a_mask_that_changes_in_place_is_read_again(model, prompt, said):
    mask = torch.ones(1, 1, 300, 300).tril().bool()
    name = register(ALL_BLOCKS)
    ours = logits(model, name, prompt, attention_mask=mask)
    torch.testing.assert_close(ours, logits(model, "sdpa", prompt), atol=1e-4, rtol=1e-4)
    assert said() == []
    mask[..., 40:, :20] = False
    ours = logits(model, name, prompt, attention_mask=mask)
    expected = logits(model, "sdpa", prompt, attention_mask=mask)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert "a mask (of padding" in said()[0]


def test_the_first_layers_stay_dense_where_they_are_told_to(model, prompt):
    kept = []
    few = SparseConfig(selector="fixed", first=0, recent=1, min_prompt=64, dense_layers=1)
    ours = logits(model, register(few, kept.append), prompt)
    assert len(kept) == 1
    assert kept[0] < 1
    every = few.model_copy(update={"dense_layers": 2})
    dense = logits(model, register(every, kept.append), prompt)
    assert len(kept) == 1
    assert torch.equal(dense, logits(model, "sdpa", prompt))
    assert (ours - dense).abs().max() > 1e-3


def test_nothing_is_said_of_sparse_prefill_decoding_and_short_prompts(model, prompt, said):
    model.set_attn_implementation(register(ALL_BLOCKS))
    model.generate(prompt, max_new_tokens=3, do_sample=False)
    model.generate(prompt[:, :20].repeat(2, 1), max_new_tokens=3, do_sample=False)
    assert said() == []


def test_compiled_code_is_told_of_dense_attention_and_stays_one_graph(said):
    attend = AttentionInterface()[register(ALL_BLOCKS)]
    module, x = torch.nn.Module(), torch.randn(2, 2, 100, 16)

    def run(q):
        return attend(module, q, q, q, None)[0]

    ours = torch.compile(run, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(ours, run(x))
    (line,) = said()
    assert "several prompts in a batch" in line


def test_options_may_be_a_mapping_and_wrong_ones_are_named(model, prompt):
    few = {"selector": "top", "top": 1, "first": 0, "recent": 1, "min_prompt": 64}
    found = [logits(model, register(config), prompt) for config in (few, SparseConfig(**few))]
    assert torch.equal(*found)
    for options, said in (
        ({"selectors": "mass"}, "selectors is an unknown key"),
        ({"mass": 2}, "mass is 2"),
        ("mass", "give a mapping"),
    ):
        with pytest.raises(BadInput, match=rf"trimtab\.sparse: .*{said}"):
            register(options)


def test_attention_sinks_are_refused():
    attend = AttentionInterface()[register(ALL_BLOCKS)]
    x = torch.zeros(1, 2, 100, 16)
    with pytest.raises(BadInput, match="Module has attention sinks"):
        attend(torch.nn.Module(), x, x, x, None, s_aux=torch.zeros(2))
