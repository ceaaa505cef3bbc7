"""Native sparse attention as a module, and in models of transformers that train with it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trimtab.core.errors import BadInput
from trimtab.kernels.sparse import SparseShape, keep_selection
from trimtab.sparse.config import NativeConfig
from trimtab.sparse.native import shape_of, use_native_attention
from trimtab.sparse.nsa import NSAAttention

pytestmark = pytest.mark.integration

SMALL = NativeConfig(window=8, stride=4, block=16, top=3, first=1, recent=1, sliding=24)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 50, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama(seed=0, **options):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, pad_token_id=0, **options))


def tokens(*shape, seed=1):
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def native():
    model = llama()
    use_native_attention(model, SMALL)
    return model


def positions(*lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("gate", ["token", "head"])
@pytest.mark.parametrize("compress", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("kv_per_branch", [True, False])
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (5, 1)])
def test_every_kind_of_module_learns_all_it_has(gate, compress, kv_per_branch, heads):
    torch.manual_seed(0)
    choices = {"gate": gate, "compress": compress, "kv_per_branch": kv_per_branch}
    module = NSAAttention(20, *heads, 8, 12, shape_of(SMALL), **choices).double()
    for name, parameter in module.named_parameters():
        if name.endswith("weight_out"):  # begins at zero, where what lies before it has no say
            torch.nn.init.normal_(parameter)
    hidden = torch.randn(2, 70, 20, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(1, 70, 4, dtype=torch.float64)
    rotation = angle.repeat(1, 1, 2).cos(), angle.repeat(1, 1, 2).sin()
    out = module(hidden, rotation)
    assert out.shape == hidden.shape
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    one_by_one = torch.cat([module(row, rotation) for row in hidden[:, None]])
    torch.testing.assert_close(out, one_by_one)
    packed = module(
        hidden.flatten(0, 1),
        tuple(part.repeat(2, 1, 1).flatten(0, 1) for part in rotation),
        torch.tensor([0, 70, 140], dtype=torch.int32),
    )
    torch.testing.assert_close(out.flatten(0, 1), packed)


def test_a_module_that_begins_with_means_compresses_by_means():
    torch.manual_seed(0)
    kinds = {
        kind: NSAAttention(16, 2, 1, 8, shape=shape_of(SMALL), compress=kind)
        for kind in ("mean", "linear", "mlp")
    }
    hidden = torch.randn(1, 60, 16)
    common = kinds["mean"].state_dict()
    outs = []
    for module in kinds.values():
        module.load_state_dict(common, strict=False)
        outs.append(module(hidden))
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(outs[2], outs[0])


def test_a_module_compiles_into_one_graph():
    torch.manual_seed(0)
    module = NSAAttention(16, 4, 2, 8, shape=shape_of(SMALL))
    hidden = torch.randn(2, 40, 16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), module(hidden))


def test_a_model_keeps_its_weights_and_tells_which_are_new():
    model = llama()
    before = dict(model.named_parameters())
    new = use_native_attention(model, SMALL)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {id(p) for p in new} == {id(p) for n, p in after.items() if n not in before}
    assert new


def test_a_selected_branch_of_all_blocks_is_the_dense_model():
    model = llama()
    ids = tokens(2, 60)
    dense = model(ids).logits
    use_native_attention(model, SMALL.model_copy(update={"top": 4}))
    for layer in model.model.layers:
        gate = layer.self_attn.gate_proj
        torch.nn.init.zeros_(gate.weight)
        gate.bias.data = torch.tensor([-1e4, 1e4, -1e4]).repeat(4)
    torch.testing.assert_close(model(ids).logits, dense, atol=1e-5, rtol=1e-4)


def test_padded_and_packed_rows_give_what_each_gives_alone(native):
    first, second = tokens(1, 45), tokens(1, 60, seed=2)
    with torch.no_grad():
        alone = [native(ids).logits[0] for ids in (first, second)]
        padded = torch.cat([torch.zeros(1, 15, dtype=torch.int64), first], 1)
        mask = torch.ones(2, 60, dtype=torch.int64)
        mask[0, :15] = 0
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        both = torch.cat([padded, second])
        rows = native(both, attention_mask=mask, position_ids=place).logits
        torch.testing.assert_close(rows[0, 15:], alone[0])
        torch.testing.assert_close(rows[1], alone[1])
        row = torch.cat([first, second], 1)
        packed = native(row, position_ids=positions(45, 60)).logits[0]
        torch.testing.assert_close(packed, torch.cat(alone))
        ends = torch.tensor([0, 45, 105], dtype=torch.int32)
        told = native(row, position_ids=positions(45, 60), cu_seq_lens_q=ends).logits[0]
        torch.testing.assert_close(told, packed)


@pytest.mark.parametrize(("before", "between", "after"), [(0, 0, 12), (12, 0, 0), (3, 20, 4)])
def test_rows_both_packed_and_padded_give_what_each_sequence_gives_alone(
    native, before, between, after
):
    first, second = tokens(1, 45), tokens(1, 60, seed=2)
    gaps = [torch.zeros(1, count, dtype=torch.int64) for count in (before, between, after)]
    row = torch.cat([gaps[0], first, gaps[1], second, gaps[2]], 1)
    place = torch.cat(
        [gaps[0], torch.arange(45)[None], gaps[1], torch.arange(60)[None], gaps[2]], 1
    )
    whole = tokens(1, row.shape[1], seed=3)
    ids = torch.cat([row, whole])
    mask = torch.cat([(row > 0).long(), torch.ones_like(whole)])
    places = torch.cat([place, torch.arange(row.shape[1])[None]])
    with torch.no_grad():
        rows = native(ids, attention_mask=mask, position_ids=places).logits
        alone = [native(one).logits[0] for one in (first, second, whole)]
    torch.testing.assert_close(rows[mask.bool()], torch.cat(alone))


@pytest.mark.parametrize("counted", [True, False])
def test_padding_within_a_sequence_does_not_part_it(native, counted):
    ids = tokens(1, 80)
    mask = torch.ones_like(ids)
    mask[0, 30:37] = 0
    place = torch.arange(80)[None] if counted else (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    other = ids.clone()
    other[0, 0] = ids[0, 0] % 40 + 1
    with torch.no_grad():
        one, two = (
            native(each, attention_mask=mask, position_ids=place).logits for each in (ids, other)
        )
    assert (one[0, 37:] - two[0, 37:]).abs().amax() > 1e-4


def test_a_mask_beside_the_ends_of_sequences_is_refused(native):
    mask = torch.ones(1, 60, dtype=torch.int64)
    mask[0, 50:] = 0
    ends = torch.tensor([0, 20, 60], dtype=torch.int32)
    with pytest.raises(BadInput, match="cu_seq_lens_q: rows have a mask of padding"):
        native(tokens(1, 60), attention_mask=mask, cu_seq_lens_q=ends)


def test_a_later_token_changes_no_earlier_logits(native):
    ids = tokens(1, 90)
    other = ids.clone()
    other[0, 50:] = tokens(40, seed=3)
    with torch.no_grad():
        before, after = native(ids).logits, native(other).logits
    assert torch.equal(before[:, :50], after[:, :50])
    assert not torch.equal(before[:, 50:], after[:, 50:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_llama_learns(dtype):
    model = llama().to(dtype)
    use_native_attention(model, SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = tokens(1, 48).repeat(1, 2)  # the second half can be copied from the first
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < losses[0] - 0.5


def test_checkpointed_layers_have_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        model = llama()
        torch.manual_seed(1)
        use_native_attention(model, SMALL)
        model.train()
        if checkpointed:
            options = {"use_reentrant": False, "context_fn": keep_selection}
            model.gradient_checkpointing_enable(options)
        ids = tokens(2, 80)
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_autocast_keeps_to_one_type(native):
    model = copy.deepcopy(native)
    ids = tokens(1, 80)
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        loose = model(ids).logits
        loose.float().sum().backward()
    assert (loose.float() - exact).abs().mean() < 0.05


def test_a_qwen_with_biases_is_taken():
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS))
    use_native_attention(model, SMALL)
    model(tokens(1, 40)).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.bias.grad.any()


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS, head_dim=8)), "k_norm, q_norm"),
        (lambda: llama(attention_dropout=0.1), "drops 0.1"),
        (lambda: torch.nn.Linear(2, 2), "no attention layer"),
    ],
)
def test_models_of_other_attention_are_refused(model, what):
    with pytest.raises(BadInput, match=what):
        use_native_attention(model(), SMALL)


def test_a_model_that_has_it_already_is_refused(native):
    with pytest.raises(BadInput, match="is native sparse attention already"):
        use_native_attention(native, SMALL)


def test_a_sliding_window_that_only_the_configuration_tells_is_refused():
    models = [
        MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=window))
        for window in (8, None)
    ]
    with pytest.raises(BadInput, match="has a sliding window of its own"):
        use_native_attention(models[0], SMALL)
    assert use_native_attention(models[1], SMALL)


def test_options_may_be_a_mapping_and_wrong_ones_are_named():
    model = llama()
    use_native_attention(model, {**SMALL.model_dump(), "gate": "token"})
    assert model.model.layers[0].self_attn.config == SMALL.model_copy(update={"gate": "token"})
    for options, said in (
        ({"blocks": 32}, "blocks is an unknown key; the nearest known one is 'block'"),
        ({"top": 2}, "1 first and 2 recent blocks are more than top, 2"),
        ("small", "the document is 'small'; give a mapping"),
    ):
        with pytest.raises(BadInput, match=rf"trimtab\.sparse\.native: {said}"):
            use_native_attention(llama(), options)


def test_caches_and_other_masks_are_refused(native):
    with pytest.raises(BadInput, match="keeps no cache"):
        native(tokens(1, 20), use_cache=True)
    with pytest.raises(BadInput, match="4 dimensions"):
        native(tokens(1, 20), attention_mask=torch.ones(1, 1, 20, 20, dtype=torch.bool))


def test_generation_goes_without_a_cache(native):
    out = native.generate(tokens(1, 20), max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 23)


@settings(max_examples=200)
@given(
    st.fixed_dictionaries(
        {
            "window": st.sampled_from([4, 8, 12, 32, 64]),
            "stride": st.sampled_from([3, 4, 8]),
            "block": st.sampled_from([16, 32, 48]),
            "top": st.integers(1, 4),
            "first": st.integers(0, 2),
            "recent": st.integers(0, 3),
        }
    )
)
def test_the_options_take_the_sizes_that_the_kernels_take(sizes):
    def accepted(make, error):
        try:
            make(**sizes)
        except error:
            return False
        return True

    kernels = accepted(SparseShape, ValueError) and sizes["block"] != 48
    assert accepted(NativeConfig, ValidationError) == kernels
