"""trimtab's backends on a mixed batch; fails where an answer is wrong.

Without a GPU its kernels are interpreted on CPU tensors, and dense attention in torch stands for
vLLM's own: it reads the metadata and the cache that those would read. The CPU's are vLLM's.
"""

from __future__ import annotations

import sys
from dataclasses import astuple, dataclass
from types import SimpleNamespace

import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.kv_cache_interface import FullAttentionSpec

from trimtab.hosts.vllm import gpu_attention
from trimtab.hosts.vllm.attention import TrimtabCpuAttention
from trimtab.hosts.vllm.prefills import split_of
from trimtab.hosts.vllm.small_model import small_model
from trimtab.kernels.sparse.block_sparse import KeyStore
from trimtab.kernels.sparse.launch import interpreted
from trimtab.kernels.sparse.prefill import Plan, sparse_prefill
from trimtab.sparse import vllm_prefill
from trimtab.sparse.config import SparseConfig
from trimtab.sparse.gpu_plan import GpuPlan
from trimtab.sparse.selection import selection

ON_GPU = torch.cuda.is_available() and not interpreted()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
NEAR = {"atol": 2e-2, "rtol": 2e-2} if ON_GPU else {"atol": 1e-5, "rtol": 1e-5}


@dataclass(frozen=True)
class Sizes:
    heads: int
    kv_heads: int
    d: int
    page: int


SIZES = Sizes(2, 1, 64 if ON_GPU else 16, 16)
OF_SMALL_MODEL = Sizes(9, 3, 64, 64)
QUERIES, TOKENS = (1, 130, 5, 70, 0), (40, 200, 64, 70, 0)
"""A decode, a chunk of a long prompt, a short chunk, a whole prompt, and padding."""
LONG = (1, 3)
LAYER = "layer"


def config(options):
    made = EngineArgs(
        model=str(small_model()),
        dtype=str(DTYPE).removeprefix("torch."),
        max_model_len=512,
        enforce_eager=True,
        additional_config={"trimtab": options},
    ).create_engine_config()
    made.compilation_config.static_forward_context.clear()
    return made


def batch(generator, sizes):
    """The metadata, queries, keys and values of the whole sequences, and a cache that has them."""
    starts = torch.tensor([0, *QUERIES]).cumsum(0).int()
    heads, kv_heads, d, page_tokens = astuple(sizes)
    needed = [-(-n // page_tokens) for n in TOKENS]
    order = torch.randperm(sum(needed) + 1, generator=generator).int()
    table = torch.zeros(len(TOKENS), max(needed), dtype=torch.int32)
    nobodys = 0.0 if ON_GPU else float("nan")  # vLLM's own kernels may multiply it by 0
    cache = torch.full((sum(needed) + 1, kv_heads, page_tokens, 2 * d), nobodys, dtype=DTYPE)
    keys, values, slots, taken = [], [], [], 0
    for number, tokens in enumerate(TOKENS):
        table[number, : needed[number]] = order[taken : taken + needed[number]]
        taken += needed[number]
        k, v = (torch.randn(tokens, kv_heads, d, generator=generator).to(DTYPE) for _ in range(2))
        at = torch.arange(tokens)
        page = table[number][at // page_tokens].long()
        keys.append(k), values.append(v)
        slots.append(page * page_tokens + at % page_tokens)
    lengths = torch.tensor(TOKENS, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(DEVICE),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(DEVICE),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(TOKENS),
        num_actual_tokens=sum(QUERIES),
        max_query_len=max(QUERIES),
        max_seq_len=max(TOKENS),
        block_table_tensor=table.to(DEVICE),
        slot_mapping=torch.cat([x[len(x) - n :] for x, n in zip(slots, QUERIES, strict=True)]).to(
            DEVICE
        ),
        causal=True,
    )
    query = torch.randn(sum(QUERIES) + 3, heads, d, generator=generator).to(DTYPE)  # some padding
    return common, query, keys, values, cache, torch.cat(slots)


def fill(impl, layer, keys, values, cache, slots):
    """Writes all keys and values into the cache; on a GPU that takes a kernel of vLLM's."""
    if isinstance(impl, CPUAttentionBackendImpl):
        cache.zero_()
        impl.do_kv_cache_update(layer, keys, values, cache, slots)
    else:
        page = cache.shape[2]
        cache[slots // page, :, slots % page] = torch.cat([keys, values], -1)


def dense(self, layer, query, key, value, kv_cache, metadata, output, *_scales):
    """What stands for vLLM's kernels."""
    starts, page = metadata.query_start_loc.tolist(), kv_cache.shape[2]
    assert key.shape[0] == query.shape[0] == output.shape[0]
    for number, tokens in enumerate(metadata.seq_lens.tolist()):
        rows = slice(starts[number], starts[number + 1])
        count = rows.stop - rows.start
        if not count:
            continue
        assert count <= metadata.max_query_len
        assert tokens <= metadata.max_seq_len
        pages = metadata.block_table[number, : -(-tokens // page)].long()
        k, v = kv_cache[pages].transpose(1, 2).flatten(0, 1)[:tokens].split(query.shape[-1], -1)
        output[rows] = causal(query[rows], k, v, self.scale)
    return output


def causal(q, k, v, scale):
    visible = torch.arange(len(k)) <= (len(k) - len(q) + torch.arange(len(q)))[:, None]
    return torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), visible, scale=scale, enable_gqa=True
    ).transpose(0, 1)


def run(backend, options, sizes, **made_with):
    """The output of a batch, what was split off, and what the batch was."""
    heads, kv_heads, d, page = astuple(sizes)
    vllm_config = config(options)
    arguments = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
    with set_current_vllm_config(vllm_config):
        impl = backend.get_impl_cls()(heads, d, d**-0.5, kv_heads, **(arguments | made_with))
        one = torch.ones((), device=DEVICE)
        scales = {"_q_scale": one, "_k_scale": one, "_v_scale": one}
        floats = {"_k_scale_float": 1.0, "_v_scale_float": 1.0}
        layer = SimpleNamespace(impl=impl, layer_name=LAYER, **scales, **floats)
        vllm_config.compilation_config.static_forward_context[LAYER] = layer
        spec = FullAttentionSpec(block_size=page, num_kv_heads=kv_heads, head_size=d, dtype=DTYPE)
        builder = backend.get_builder_cls()(spec, [LAYER], vllm_config, DEVICE)
        graphs = builder.get_cudagraph_support(vllm_config, spec)
    layer.isa = getattr(builder, "isa", None)
    common, query, keys, values, cache, slots = batch(torch.Generator().manual_seed(5), sizes)
    fill(impl, layer, torch.cat(keys), torch.cat(values), cache, slots)
    cache = cache.to(DEVICE)
    metadata = builder.build(0, common)
    new = [
        torch.cat([x[len(x) - n :] for x, n in zip(all_of, QUERIES, strict=True)])
        for all_of in (keys, values)
    ]
    padded = [torch.cat([x, x.new_zeros(3, *x.shape[1:])]).to(DEVICE) for x in new]
    output = torch.full_like(query, 7.0, device=DEVICE)
    assert impl.forward(layer, query.to(DEVICE), *padded, cache, metadata, output) is output
    return SimpleNamespace(
        output=output.cpu(),
        split=split_of(metadata),
        graphs=graphs,
        query=query,
        keys=keys,
        values=values,
    )


def rows(number):
    return slice(sum(QUERIES[:number]), sum(QUERIES[: number + 1]))


def check(backend, options, sizes, leaves_out):
    """Long prompts as on a CPU, all others dense, and padding untouched."""
    found = run(backend, options, sizes)
    scale = sizes.d**-0.5
    shares = []
    kept = SparseConfig(**options["sparse"])
    assert found.graphs.value <= AttentionCGSupport.UNIFORM_BATCH.value  # no prefill in a graph
    assert [span.rows for span in found.split.spans] == [rows(n) for n in LONG]
    for number, (k, v) in enumerate(zip(found.keys, found.values, strict=True)):
        q = found.query[rows(number)]
        if number in LONG:
            store = KeyStore.packed(k, v, torch.tensor([0, len(k)], dtype=torch.int32))
            expected, position = torch.empty_like(q), len(k) - len(q)
            share = sparse_prefill(
                q, lambda k=k: k, store, position, expected, scale, selection(kept)
            )
            shares.append(share)
        elif len(q):
            expected = causal(q, k, v, scale)
        else:
            continue
        torch.testing.assert_close(found.output[rows(number)], expected, **NEAR)
    assert (min(shares) < 1) == leaves_out
    assert (found.output[sum(QUERIES) :] == 7).all()


def leaves_all_to_vllm(backend, options, **made_with):
    found = run(backend, options, SIZES, **made_with)
    assert found.split is None
    for number, (k, v) in enumerate(zip(found.keys, found.values, strict=True)):
        if QUERIES[number]:
            expected = causal(found.query[rows(number)], k, v, SIZES.d**-0.5)
            torch.testing.assert_close(found.output[rows(number)], expected, **NEAR)


if not ON_GPU:
    TritonAttentionImpl.forward = FlashAttentionImpl.forward = dense
vllm_prefill.plan = lambda *_: Plan("compiled", {"dense": 1.0})
vllm_prefill.plan_on_gpu = lambda *_: GpuPlan("sparse", 1.0, 0.5, "")
SOME = {"sparse": {"selector": "mass", "mass": 0.3, "first": 0, "recent": 1, "min_prompt": 64}}
ALL = {"sparse": {"selector": "top", "top": 1000, "min_prompt": 64}}
for name in sys.argv[1:]:
    of = getattr(gpu_attention, name)
    check(of, SOME, SIZES, leaves_out=True)
    check(of, ALL, SIZES, leaves_out=False)
    leaves_all_to_vllm(of, {})
    leaves_all_to_vllm(of, ALL, logits_soft_cap=30.0)
if not ON_GPU:
    check(TrimtabCpuAttention, SOME, OF_SMALL_MODEL, leaves_out=True)
