"""What the attention backends hand to plugins: which prefills, and everything needed to do them.

vLLM has one backend a kind of layer, so plugins share trimtab's: `attention` on CPUs, and
`gpu_attention`. A plugin offers its prefill by an entry point of the group
``trimtab.vllm_prefill``: a function from the plugin's block of options to a `Prefiller`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from trimtab.hosts.vllm import options
from trimtab.hosts.vllm.cache_layout import PagedKeys

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

GROUP = "trimtab.vllm_prefill"

_SPLIT = "trimtab_split"


@dataclass(frozen=True, slots=True)
class PagedTensors:
    """A layer's cache as plain tensors ``[pages, kv_heads, page_tokens, d]``, any strides."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What the layers of one cache have in common."""

    heads: int
    kv_heads: int
    head_size: int
    page_tokens: int
    """Tokens of a page of the cache."""
    generation: int
    """The first number of an NVIDIA GPU's compute capability, 0 elsewhere."""
    dense: str
    """The backend of vLLM that does what no plugin takes, such as ``FLASH_ATTN``."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """The new tokens of one request in one layer."""

    layer: str
    query: Tensor
    """``[queries, heads, d]``."""
    new_keys: Tensor
    """The keys of these tokens, ``[queries, kv_heads, d]``; the cache holds them too."""
    out: Tensor
    """Where the attention goes, ``[queries, heads, d]``."""
    cache: PagedKeys | PagedTensors
    """The former on a CPU."""
    pages: Tensor
    """The request's pages of the cache, ``[pages]``; on a GPU maybe more than it has."""
    keys: int
    """Tokens of the request so far, new ones included."""
    scale: float


class Prefiller(Protocol):
    """What a plugin does with prefills."""

    def wants(self, queries: int, keys: int, layers: LayerShape) -> bool:
        """Whether to take a request's new tokens, in all layers.

        Args:
            queries: how many they are.
            keys: the request's tokens, new ones included.
            layers: the layers.
        """

    def prefill(self, work: Prefill) -> None:
        """Writes the attention of the new tokens into ``work.out``."""


def prefiller(additional_config: object) -> Prefiller | None:
    """The prefill of the first plugin that is switched on and has one; all layers share it.

    Raises:
        BadInput: the plugin's options are wrong.
    """
    for name, block in options.enabled(additional_config).items():
        if name in entry_points(group=GROUP).names:
            return _made(name, json.dumps(block, sort_keys=True))
    return None


@cache
def _made(name: str, block: str) -> Prefiller:
    (entry,) = entry_points(group=GROUP, name=name)
    made: Prefiller = entry.load()(json.loads(block))
    return made


@dataclass(frozen=True, slots=True)
class Span:
    """A request whose prefill a plugin takes: its rows in the batch, its pages and its tokens."""

    rows: slice
    pages: Tensor
    keys: int


@dataclass(frozen=True, slots=True)
class Split:
    """A batch cut into what a plugin takes, and vLLM's metadata of what is left, if any is."""

    spans: Sequence[Span]
    rest: Any | None
    rest_rows: Tensor | None
    """The rows of the rest in the batch."""


def kind_of(attn_type: str) -> str:
    """What vLLM's type of attention is called in a sentence, such as "encoder-only attention"."""
    return f"{getattr(attn_type, 'value', attn_type).replace('_', '-')} attention"


def wanted(
    taker: Prefiller, starts: Sequence[int], lengths: Sequence[int], layers: LayerShape
) -> list[int]:
    """The numbers of the requests that a plugin takes.

    Args:
        taker: the plugin's.
        starts: each request's first row in the batch, and the end.
        lengths: each request's tokens, new ones included.
        layers: the layers.
    """
    return [
        number
        for number, keys in enumerate(lengths)
        if taker.wants(starts[number + 1] - starts[number], keys, layers)
    ]


def set_apart(
    whole: Any,
    common: CommonAttentionMetadata,
    spans: Mapping[int, Span],
    build: Callable[[CommonAttentionMetadata], Any],
) -> None:
    """Notes on a batch's metadata what a plugin takes, and has the rest's built.

    Args:
        whole: vLLM's metadata of the batch.
        common: what it was built from.
        spans: what the plugin takes, by the request's number.
        build: makes vLLM's metadata.
    """
    rest = _without(common, spans)
    part, rows = (None, None) if rest is None else (build(rest[0]), rest[1])
    setattr(whole, _SPLIT, Split(list(spans.values()), part, rows))


def split_of(metadata: Any) -> Split | None:
    """What `set_apart` has noted."""
    found: Split | None = getattr(metadata, _SPLIT, None)
    return found


def dense_rows(
    split: Split, tensors: tuple[Tensor, Tensor, Tensor], out: Tensor, attend: Callable[..., Any]
) -> None:
    """Has vLLM attend for the rows that no plugin takes.

    Args:
        split: of the batch.
        tensors: its queries, keys and values.
        out: ``[rows, heads, d]``.
        attend: from queries, keys, values, metadata and an output.
    """
    rows = split.rest_rows
    if rows is None:
        return
    part = [x[rows] for x in tensors]
    dense = out.new_empty(rows.numel(), *out.shape[1:])
    attend(*part, split.rest, dense)
    out[rows] = dense


_BY_REQUEST = (
    "seq_lens",
    "block_table_tensor",
    "encoder_seq_lens",
    "encoder_seq_lens_cpu",
    "dcp_local_seq_lens",
    "dcp_local_seq_lens_cpu_upper_bound",
    "is_prefilling",
    "seq_lens_cpu_upper_bound",
    "req_idx",
    "rswa_prefix_lens",
    "replayssm_decode_base_cpu",
)
"""Of vLLM's metadata, what has a row for each request."""


def _without(
    whole: CommonAttentionMetadata, taken: Collection[int]
) -> tuple[CommonAttentionMetadata, Tensor] | None:
    """The batch without some requests, and the rows that its queries have in the whole one."""
    left = [number for number in range(whole.num_reqs) if number not in taken]
    starts = whole.query_start_loc_cpu.tolist()
    lengths = [starts[n + 1] - starts[n] for n in left]
    if not sum(lengths):
        return None
    device = whole.query_start_loc.device
    rows = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in left]).to(device)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(whole.query_start_loc.dtype)
    by_request = {
        name: value[left]
        for name in _BY_REQUEST
        if (value := getattr(whole, name, None)) is not None
    }
    part = replace(
        whole,
        query_start_loc=ends.to(device),
        query_start_loc_cpu=ends,
        num_reqs=len(left),
        num_actual_tokens=len(rows),
        max_query_len=max(lengths),
        slot_mapping=whole.slot_mapping[rows],
        positions=None if whole.positions is None else whole.positions[rows],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
        **by_request,
    )
    return part, rows
