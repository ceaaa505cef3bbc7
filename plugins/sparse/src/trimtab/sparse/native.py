"""Native sparse attention in a transformers model, in place of its own, to train it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.documents import validate
from trimtab.core.errors import BadInput
from trimtab.hosts.deepspeed.partitioned import whole
from trimtab.kernels.sparse import SparseShape
from trimtab.sparse.config import NativeConfig
from trimtab.sparse.nsa import NSAAttention, Rotation

NAME = "trimtab_native_sparse"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_SUPPORTED = "give a transformers model with the attention of Llama, Mistral or Qwen2"


def shape_of(config: NativeConfig) -> SparseShape:
    """The sizes, as the kernels want them."""
    return SparseShape(
        window=config.window,
        stride=config.stride,
        block=config.block,
        top=config.top,
        first=config.first,
        recent=config.recent,
        sliding=config.sliding,
    )


class NativeAttention(NSAAttention):
    """`NSAAttention` with the signature of transformers' attention layers.

    Args:
        layer: what it takes the place of; its projections become this one's.
        config: sizes and choices.
    """

    def __init__(self, layer: Any, config: NativeConfig) -> None:
        q, k, v, o = (getattr(layer, name) for name in _PROJECTIONS)
        kv_heads = k.out_features // layer.head_dim
        super().__init__(
            q.in_features,
            q.out_features // layer.head_dim,
            kv_heads,
            layer.head_dim,
            v.out_features // kv_heads,
            shape_of(config),
            gate=config.gate,
            compress=config.compress,
            kv_per_branch=config.kv_per_branch,
            bias=q.bias is not None,
            output_bias=o.bias is not None,
        )
        self.to(q.weight)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = q, k, v, o
        if self.other_kv is not None:
            with whole([*k.parameters(), *v.parameters()]):
                for name, projection in self.other_kv.items():
                    projection.load_state_dict((k if "_k_" in name else v).state_dict())
        self.layer_idx, self.config = layer.layer_idx, config

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: Rotation | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attends within each sequence of each row; padding is left out, and its output is 0.

        Raises:
            BadInput: there is a cache of keys, or a mask that is not of padding, or one beside
                ``cu_seq_lens_q``, or rows are padded or packed while ranks share sequences.
        """
        if past_key_values is not None:
            raise BadInput(
                "native sparse attention to train with keeps no cache of keys",
                where="past_key_values",
                fix="pass use_cache=False",
            )
        if attention_mask is not None and attention_mask.dim() != 2:
            raise BadInput(
                f"the mask has {attention_mask.dim()} dimensions",
                where="attention_mask",
                fix="give one of padding, [batch, tokens], and pack sequences by position_ids",
            )
        if attention_mask is not None and cu_seq_lens_q is not None:
            raise BadInput(
                "rows have a mask of padding beside the ends of their sequences",
                where="cu_seq_lens_q",
                fix="leave the padding out of the rows, or pack sequences by position_ids",
            )
        ends = cu_seq_lens_q
        if ends is None and position_ids is not None:
            ends = _ends(position_ids, hidden_states.shape[0])
        if self._parallel is not None and (attention_mask is not None or ends is not None):
            raise BadInput(
                "rows are padded or packed while ranks share sequences",
                where="attention_mask" if ends is None else "position_ids",
                fix="give each row one whole sequence",
            )
        if attention_mask is not None:
            out = self._padded(hidden_states, position_embeddings, attention_mask, position_ids)
            return out, None
        return super().forward(hidden_states, position_embeddings, ends), None

    def _padded(
        self,
        hidden: Tensor,
        rotation: Rotation | None,
        mask: Tensor,
        position_ids: Tensor | None,
    ) -> Tensor:
        known = mask.bool()
        counts = known.sum(-1, dtype=torch.int32)
        ends = nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        if position_ids is not None:
            ends = torch.cat([ends, _restarts(position_ids, known)]).sort().values
        if rotation is not None:
            cos, sin = (x.expand(*known.shape, x.shape[-1])[known] for x in rotation)
            rotation = cos, sin
        out = torch.zeros_like(hidden)
        out[known] = super().forward(hidden[known], rotation, ends).to(out.dtype)
        return out


def _ends(position_ids: Tensor, rows: int) -> Tensor | None:
    """Ends of packed sequences, where positions start again; None where each row is one sequence.

    Compiled code cannot look; there sequences are packed by ``cu_seq_lens_q``.
    """
    if torch.compiler.is_compiling():
        return None
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=-1) != 1
    if int(begins.sum()) == position_ids.shape[0]:
        return None
    starts = begins.expand(rows, -1).flatten().nonzero()[:, 0].int()
    return nn.functional.pad(starts, (0, 1), value=rows * position_ids.shape[1])


def _restarts(position_ids: Tensor, known: Tensor) -> Tensor:
    """Where positions start again within rows, among the tokens that are no padding.

    A sequence goes on where a position is one more than the last token's, or as many more as the
    tokens of padding between them: both ways of counting around padding are in use.
    """
    row, column = known.nonzero(as_tuple=True)
    steps = position_ids.expand(known.shape)[row, column].diff()
    goes_on = (steps == 1) | (steps == column.diff())
    return ((row.diff() == 0) & ~goes_on).nonzero()[:, 0].int() + 1


def use_native_attention(
    model: nn.Module,
    config: NativeConfig | Mapping[str, Any] | None = None,
    sequence_group: Any = None,
) -> list[nn.Parameter]:
    """Replaces every attention layer of a transformers model by native sparse attention.

    It is done in place, before an optimizer is made. Projections keep their weights, the same
    parameters as before; gates and the maps of windows are new. Any model will do whose attention
    layers are four projections and rotary positions: Llama's, Mistral's and Qwen2's kind.

    Args:
        model: of transformers, with its usual weights; it may be part of another module, and its
            weights spread over ranks by ``deepspeed.zero.Init``.
        config: sizes and choices, also as a mapping of options; the defaults without one.
        sequence_group: of torch.distributed: ranks that each give their part of every sequence, in
            the order of ranks and with its ``position_ids`` (DeepSpeed-Ulysses).

    Returns:
        The new parameters.

    Raises:
        BadInput: the model has no such layer, or its attention does what this one does not; or an
            option is unknown or out of range.
    """
    chosen = validate(NativeConfig, {} if config is None else config, where="trimtab.sparse.native")
    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if all(hasattr(child, projection) for projection in _PROJECTIONS)
    ]
    if not layers:
        raise BadInput(
            f"{type(model).__name__} has no attention layer with {', '.join(_PROJECTIONS)}",
            fix=f"{_SUPPORTED}, or build one with trimtab.sparse.nsa.NSAAttention",
        )
    for _, name, layer in layers:
        _check(name, layer)
    models = [module for module in model.modules() if hasattr(module, "set_attn_implementation")]
    if not models:
        raise BadInput(f"{type(model).__name__} holds no model of transformers", fix=_SUPPORTED)
    known = {id(parameter) for parameter in model.parameters()}
    for parent, name, layer in layers:
        ours = NativeAttention(layer, chosen)
        if sequence_group is not None:
            ours.share_sequences(sequence_group)
        setattr(parent, name, ours)
    for one in models:
        _leave_masks_alone(one)
    return [parameter for parameter in model.parameters() if id(parameter) not in known]


def _sliding_window(layer: nn.Module) -> object:
    """A layer's own, or, where it has none such as Mistral's, that of its configuration."""
    if hasattr(layer, "sliding_window"):
        return layer.sliding_window
    return getattr(getattr(layer, "config", None), "sliding_window", None)


def _check(name: str, layer: nn.Module) -> None:
    kind = type(layer).__name__
    if isinstance(layer, NativeAttention):
        raise BadInput(
            "the attention is native sparse attention already", where=name, fix="change it once"
        )
    others = sorted({child for child, _ in layer.named_children()} - set(_PROJECTIONS))
    dropout = getattr(layer, "attention_dropout", 0.0)
    faults = {
        f"has {', '.join(others)} beside its projections": bool(others),
        "has a head_dim of no number": not isinstance(getattr(layer, "head_dim", None), int),
        f"drops {dropout:g} of its probabilities": bool(dropout),
        "has a sliding window of its own": _sliding_window(layer) is not None,
        "is not causal": not getattr(layer, "is_causal", True),
    }
    for fault, found in faults.items():
        if found:
            raise BadInput(
                f"{kind} {fault}, which native sparse attention has not",
                where=name,
                fix=f"{_SUPPORTED}, without it",
            )


def _leave_masks_alone(model: Any) -> None:
    """Has the model hand its padding on as it is, and keep no cache."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    def attend(*_: object, **__: object) -> None:
        raise BadInput(
            "native sparse attention is no function but a layer",
            where=f"attn_implementation={NAME!r}",
            fix="call trimtab.sparse.native.use_native_attention(model), or for a saved one"
            " trimtab.sparse.saving.load_native_model(folder)",
        )

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    model.set_attn_implementation(NAME)
    model.config.use_cache = False
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.use_cache = False
