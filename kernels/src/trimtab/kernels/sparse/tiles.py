"""Attention of a batch of tiles in plain torch: what the CPU paths share.

Queries are ``[tiles, rows, d]``, keys and values ``[tiles, columns, d or d_v]``, a mask broadcasts
to ``[tiles, rows, columns]``. Keys and values that a query does not see never reach it, not even
where they are infinite or no numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = -1.0e30


def wide(x: Tensor) -> Tensor:
    """In the type that sums are made in: double stays double, all others become single."""
    return x if x.dtype == torch.float64 else x.float()


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[tiles, rows, d_v]`` and natural logarithm ``[tiles, rows]``."""
    logits = torch.bmm(q * scale, k.mT).masked_fill_(~visible, float("-inf"))
    top = logits.amax(-1, keepdim=True).clamp_(min=_LEAST)
    p = logits.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    out = weighted(p, v, visible).div_(total.masked_fill(total == 0, 1.0))
    return out, (top + total.log()).squeeze(-1)


def weighted(p: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """The product of weights and values, to which what a query sees of infinities is added."""
    finite = v.isfinite()
    if bool(finite.all()):
        return torch.bmm(p, v)
    out = torch.bmm(p, v.masked_fill(~finite, 0.0))
    seen = visible.expand(p.shape).to(p.dtype)
    for infinity in (float("inf"), float("-inf")):
        # What is no number counts as both, as their sum is none.
        odd = ~finite & (v != -infinity)
        found = torch.bmm(seen, odd.to(p.dtype)) > 0
        out += torch.zeros_like(out).masked_fill_(found, infinity)
    return out


def differentiate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    above: Tensor,
    lse: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the tiles add to the gradients of queries, keys and values.

    Args:
        q: queries.
        k: keys.
        v: values.
        visible: the mask.
        scale: of the logits.
        above: the output's gradient ``[tiles, rows, d_v]``.
        lse: logarithms over all that a query sees, here and elsewhere ``[tiles, rows]``.
        delta: the products of outputs and their gradients ``[tiles, rows]``.
    """
    hidden = ~visible
    scaled = q * scale
    p = torch.bmm(scaled, k.mT).sub_(lse[..., None]).masked_fill_(hidden, float("-inf")).exp_()
    dv = torch.bmm(p.mT, above)
    ds = torch.bmm(above, v.mT).sub_(delta[..., None]).mul_(p).masked_fill_(hidden, 0.0)
    known = k if bool(k.isfinite().all()) else k.nan_to_num(0.0, 0.0, 0.0)
    return torch.bmm(ds, known).mul_(scale), torch.bmm(ds.mT, scaled), dv
