"""What sparse prefill costs in quality: a real text's likelihood under the small real model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.hosts.vllm.small_model import small_model
from trimtab.kernels.sparse.selectors import COUNTED
from trimtab.sparse.config import SparseConfig
from trimtab.sparse.in_transformers import register

TOKENS = 4096
_QUICK_TOKENS = 1024


def settings(quick: bool) -> Sequence[SparseConfig]:
    """The default, other shares and the other selectors, the oracle among them."""
    default = SparseConfig(min_prompt=64)
    if quick:
        return [default]
    changes: Sequence[dict[str, Any]] = (
        {},
        *({"mass": share} for share in (0.8, 0.9, 0.95, 0.99)),
        *({"selector": name, "mass": 0.9} for name in ("pooled", "antidiagonal", "oracle")),
        *({"selector": name, "top": 16} for name in ("top", "minmax")),
        {"selector": "fixed", "recent": 16},
        {"mass": 0.9, "by": "query"},
        {"mass": 0.9, "dense_layers": 2},
    )
    return [default.model_copy(update=change) for change in changes]


def quality_cases(options: Options, progress: Progress) -> Iterator[Case]:
    """The mean negative log-likelihood of a text's second half, against dense attention."""
    from transformers import AutoModelForCausalLM

    tokens = _QUICK_TOKENS if options.quick else TOKENS
    model: Any = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.bfloat16)
    model.eval()
    ids = _text(tokens)
    progress(f"likelihood of {tokens} tokens under dense attention")
    model.set_attn_implementation("sdpa")
    dense = _nll(model, ids)
    for config in settings(options.quick):
        name = _name(config)
        progress(f"likelihood of {tokens} tokens under {name}")
        kept: list[float] = []
        model.set_attn_implementation(register(config, kept.append))
        ours = _nll(model, ids)
        yield Case.compare(
            f"real/quality/{tokens}/{name}",
            "negative_log_likelihood",
            "nat",
            "lower",
            "dense SDPA",
            [(dense, ours)],
            notes=f"{ours - dense:+.4f} nat at {mean(kept):.1%} of the causal blocks",
        )


def _name(config: SparseConfig) -> str:
    """The selector and how much it keeps, and what is not as usual."""
    amount = config.top if config.selector in COUNTED else config.mass
    name = f"{config.selector}-{config.recent if config.selector == 'fixed' else amount:g}"
    if config.by == "query":
        name += "-by-query"
    if config.dense_layers:
        name += f"-after-{config.dense_layers}-layers"
    return name


def _text(tokens: int) -> Tensor:
    """Python's own documentation, which every installation has."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model())
    text = "\n".join(topics[name] for name in sorted(topics))[: tokens * 8]
    return torch.tensor([tokenizer.encode(text)[:tokens]])


@torch.no_grad()
def _nll(model: Any, ids: Tensor) -> float:
    logits = model(ids, use_cache=False).logits[0, ids.shape[1] // 2 : -1].float()
    return float(cross_entropy(logits, ids[0, ids.shape[1] // 2 + 1 :]))
