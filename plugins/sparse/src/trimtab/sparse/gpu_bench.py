"""``trimtab bench sparse-gpu``: every sparse kernel on a real GPU, beside dense flash attention.

Also beside FSA as published where that has a counterpart, and beside what was predicted without a
GPU: a case whose baseline is the prediction has the predicted time over the measured one as ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.core.devices import DeviceProfile, device
from trimtab.core.errors import BadInput
from trimtab.kernels.sparse import (
    SparseShape,
    Windows,
    compressed_attention,
    native_sparse_attention,
    select_blocks,
    selected_attention,
    sliding_attention,
)
from trimtab.kernels.sparse.paged_prefill import PagedCache, paged_prefill
from trimtab.kernels.sparse.selectors import Selection
from trimtab.sparse.gpu_clock import Device, GpuDevice, Work, each_kernel
from trimtab.sparse.lists_bench import materialised
from trimtab.sparse.performance_model import GPUS, model
from trimtab.sparse.published_figures import HEAD_SIZE, HEADS, Run
from trimtab.sparse.roofline import Sizes, dense_s, kernel_s

_K = 1024
_PAGE = 16
_QUERIES_AT_ONCE = 1024
_DENSE, _PUBLISHED = "dense flash SDPA", "FSA as published"
_PREDICTED = "what was predicted without a GPU"
_PREFILLS = {
    "top": Selection("top", top=16),
    "mass": Selection("mass"),
    "by-query": Selection("top", top=16, by="query"),
}


def grid(quick: bool) -> Iterator[Sizes]:
    """The sequences and group sizes of FSA's paper, longest last."""
    for thousands in (8, 32) if quick else (8, 16, 32, 64, 128):
        for group in (1, 4) if quick else (1, 2, 4, 8, 16):
            yield Sizes(
                tokens=thousands * _K,
                heads=HEADS,
                kv_heads=HEADS // group,
                d=HEAD_SIZE,
                d_v=HEAD_SIZE,
                dtype=torch.bfloat16,
                shape=SparseShape(),
            )


def run(
    options: Options,
    progress: Progress,
    on: Device | None = None,
    sizes: Sequence[Sizes] | None = None,
    repeats: int | None = None,
) -> list[Case]:
    """All cases.

    Args:
        options: ``quick`` takes two lengths and two group sizes.
        progress: told of each size.
        on: where; the current GPU by default.
        sizes: what is run; `grid` by default.
        repeats: of each time; 7 by default, and 3 where it is to be quick.

    Raises:
        Unsupported: there is no GPU.
    """
    on = on or GpuDevice()
    torch.manual_seed(options.seed)
    every = list(grid(options.quick) if sizes is None else sizes)
    repeats = repeats or (3 if options.quick else 7)
    cases: list[Case] = []
    for number, of in enumerate(every):
        progress(f"{of.tokens} tokens, {of.group} heads a KV head", number / len(every))
        bench = _Bench(of, on, _profile(on.name), repeats)
        try:
            cases += bench.cases()
        except torch.OutOfMemoryError:
            progress(f"{of.tokens} tokens do not fit the memory of {on.name}")
    return [*cases, *_errors(cases, on)]


def _profile(name: str) -> DeviceProfile | None:
    """What is known of a GPU, by its name or a word of it."""
    for known in (name, *name.split()):
        try:
            return device(known)
        except BadInput:
            continue
    return None


@dataclass(frozen=True)
class _Operation:
    """One operator, and what it is held against."""

    name: str
    work: Work
    dense: Work
    backward: bool = False
    published: Work | None = None
    seen: float = 0.0
    """Keys that a query sees on average, where kernels of spans run."""
    whole: bool = False
    """Whether it is all of native sparse attention."""


@dataclass(frozen=True)
class _Bench:
    of: Sizes
    on: Device
    profile: DeviceProfile | None
    repeats: int

    def cases(self) -> Iterator[Case]:
        """Of all operations, one after the other."""
        data = _Data(self.of, self.on.where)
        yield from self._dense(data)
        for operation in operations(data):
            yield from self._operation(operation)

    def _dense(self, data: _Data) -> Iterator[Case]:
        for backward, work in ((False, data.dense), (True, data.dense_backward())):
            (times,) = self._in_turn(work)
            if self.profile is not None:
                predicted = dense_s(self.of, self.profile, backward=backward)
                name = "dense_backward" if backward else "dense_forward"
                yield self._predicted(name, "time", predicted, times)

    def _operation(self, of: _Operation) -> Iterator[Case]:
        rivals = {_DENSE: of.dense} | ({_PUBLISHED: of.published} if of.published else {})
        *theirs, times = self._in_turn(*rivals.values(), of.work)
        for baseline, its in zip(rivals, theirs, strict=True):
            yield self._case(of.name, "time", baseline, list(zip(its, times, strict=True)))
        if of.whole and (predicted := self._fitted_s(of.backward)) is not None:
            yield self._predicted(of.name, "time", predicted, times, "fitted to published times")
        found = [each_kernel(self.on, of.work) for _ in range(self.repeats)]
        for kernel in found[0]:
            metric, its = f"{kernel}_time", [one[kernel] for one in found]
            yield self._case(of.name, metric, _DENSE, list(zip(theirs[0], its, strict=True)))
            if self.profile is not None:
                should = kernel_s(kernel, self.of, of.seen, self.profile)
                if should is not None:
                    yield self._predicted(of.name, metric, should, its)

    def _in_turn(self, *works: Work) -> list[list[float]]:
        """Seconds of each, after a call that is not counted: it compiles kernels."""
        for work in works:
            work()
        rounds = [[self.on.seconds(work) for work in works] for _ in range(self.repeats)]
        return [list(times) for times in zip(*rounds, strict=True)]

    def _case(
        self,
        name: str,
        metric: str,
        baseline: str,
        pairs: list[tuple[float, float]],
        notes: str | None = None,
    ) -> Case:
        gpu = "-".join(self.on.name.split())
        where = f"{gpu}/{self.of.tokens}/group-{self.of.group}"
        return Case.compare(
            f"real/{where}/{name}", metric, "s", "lower", baseline, pairs, notes=notes
        )

    def _predicted(
        self, name: str, metric: str, predicted: float, times: list[float], how: str = "a roofline"
    ) -> Case:
        off = predicted / median(times) - 1
        return self._case(
            *(name, metric, _PREDICTED, [(predicted, t) for t in times]),
            notes=f"by {how}; the prediction is {off:+.0%} off",
        )

    def _fitted_s(self, backward: bool) -> float | None:
        """What `performance_model` says, for the GPUs, heads and blocks that it knows."""
        of = self.of
        gpu = next((g for g in GPUS if g in self.on.name.casefold().split()), None)
        known = (of.heads, of.d, of.d_v) == (HEADS, HEAD_SIZE, HEAD_SIZE)
        if gpu is None or not known:
            return None
        what = Run(gpu, of.tokens, of.group, of.shape.block, of.shape.top)
        forward = model(gpu).forward_s("ours", what)
        return model(gpu).both_s("ours", what) - forward if backward else forward


class _Data:
    """Random tensors of a size, and dense attention over them."""

    def __init__(self, of: Sizes, where: torch.device) -> None:
        def some(heads: int, size: int) -> Tensor:
            shape = (of.tokens, heads, size)
            return torch.randn(shape, dtype=of.dtype, device=where, requires_grad=True)

        self.of = of
        self.q, self.k, self.v = (
            some(heads, size)
            for heads, size in ((of.heads, of.d), (of.kv_heads, of.d), (of.kv_heads, of.d_v))
        )
        self.ends = torch.tensor([0, of.tokens], dtype=torch.int32, device=where)
        windows = Windows.of(self.ends, of.tokens, of.shape)
        self.entry_ends = windows.ends
        self.entries_k, self.entries_v = (
            windows.mean(x).detach().requires_grad_() for x in (self.k, self.v)
        )
        self.gates = torch.rand(of.tokens, of.heads, 3, dtype=of.dtype, device=where)
        self.above = torch.randn(of.tokens, of.heads, of.d_v, dtype=of.dtype, device=where)

    def _attend(self) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (self.q, self.k, self.v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out: Tensor = scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=self.of.group > 1
            )
        return out[0].transpose(0, 1)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Dense causal attention, ``[tokens, heads, d_v]``."""
        return self._attend()

    def dense_backward(self) -> Work:
        """Its backward pass."""
        return self.backward(self._attend, self.q, self.k, self.v)

    def backward(self, forward: Callable[[], Tensor], *inputs: Tensor) -> Work:
        """The backward pass of some attention, whose forward is done once."""
        out: list[Tensor] = []

        def work() -> object:
            if not out:
                out.append(forward())
            return torch.autograd.grad(out[0], inputs, self.above, retain_graph=True)

        return work


def operations(data: _Data) -> Iterator[_Operation]:
    """All operators that run on a GPU; each frees what the one before kept."""
    of, ends = data.of, data.ends
    every = (ends, ends, data.entry_ends)
    sees = {"compressed": of.shape.entries(of.tokens) / 2, "sliding": float(of.shape.sliding)}
    with torch.no_grad():
        blocks = select_blocks(data.q, data.entries_k, *every, of.shape)

    def choose() -> object:
        return select_blocks(data.q, data.entries_k, *every, of.shape)

    def choose_as_published() -> object:
        size = _QUERIES_AT_ONCE
        return [
            materialised(data.q[at : at + size], data.entries_k[:known], until, of.shape)
            for at in range(0, of.tokens, size)
            for until in (min(at + size, of.tokens),)
            for known in (of.shape.entries(until),)
        ]

    forwards: Mapping[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]] = {
        "compressed": (
            lambda: compressed_attention(data.q, data.entries_k, data.entries_v, *every, of.shape)[
                0
            ],
            (data.q, data.entries_k, data.entries_v),
        ),
        "selected": (
            lambda: selected_attention(
                data.q, data.k, data.v, blocks, ends, ends, block=of.shape.block
            )[0],
            (data.q, data.k, data.v),
        ),
        "sliding": (
            lambda: sliding_attention(data.q, data.k, data.v, ends, ends, window=of.shape.sliding)[
                0
            ],
            (data.q, data.k, data.v),
        ),
        "native": (
            lambda: native_sparse_attention(
                *(data.q, data.k, data.v, data.entries_k, data.entries_v, data.gates),
                *(*every, of.shape),
            ),
            (data.q, data.k, data.v, data.entries_k, data.entries_v),
        ),
    }

    def selected_as_published() -> object:
        return selected_attention(
            *(data.q, data.k, data.v, blocks, ends, ends),
            block=of.shape.block,
            as_published=True,
        )

    yield _Operation(
        "select", _quietly(choose), data.dense, published=_quietly(choose_as_published)
    )
    published = _Operation("published", _quietly(selected_as_published), data.dense)
    yield published
    for name, (forward, inputs) in forwards.items():
        seen, whole = sees.get(name, 0.0), name == "native"
        rival = published.work if name == "selected" else None
        yield _Operation(
            *(f"{name}_forward", _quietly(forward), data.dense),
            published=rival,
            seen=seen,
            whole=whole,
        )
        yield _Operation(
            *(f"{name}_backward", data.backward(forward, *inputs), data.dense_backward()),
            backward=True,
            seen=seen,
            whole=whole,
        )
    if of.d == of.d_v:
        yield from _prefills(data)


def _quietly(work: Work) -> Work:
    """Without a graph for gradients."""

    def quiet() -> object:
        with torch.no_grad():
            return work()

    return quiet


def _prefills(data: _Data) -> Iterator[_Operation]:
    """Of a dense model's prompt, out of pages in any order; by tiles and by queries."""
    of = data.of
    count = -(-of.tokens // _PAGE)
    pages = torch.randperm(count, device=data.q.device).int()
    k, v = (
        torch.zeros(count * _PAGE, of.kv_heads, size, dtype=of.dtype, device=data.q.device)
        for size in (of.d, of.d_v)
    )
    k[: of.tokens], v[: of.tokens] = data.k.detach(), data.v.detach()
    paged = [x.view(count, _PAGE, *x.shape[1:])[pages.argsort()].transpose(1, 2) for x in (k, v)]
    cache = PagedCache(paged[0], paged[1], pages)
    q, out = data.q.detach(), torch.empty_like(data.q)
    for name, selection in _PREFILLS.items():

        def prefill(selection: Selection = selection) -> object:
            return paged_prefill(q, cache, 0, out, of.d**-0.5, selection)

        with torch.no_grad():
            share = float(paged_prefill(q, cache, 0, out, of.d**-0.5, selection))
        yield _Operation(
            f"prefill_{name}",
            _quietly(prefill),
            data.dense,
            seen=share * of.tokens / 2,
        )


def _errors(cases: Sequence[Case], on: Device) -> Iterator[Case]:
    """Mean relative errors of all predictions, by how they were made."""
    for how in ("a roofline", "fitted to published times"):
        off = [
            abs(c.baseline_value / c.value - 1)
            for c in cases
            if c.baseline == _PREDICTED and (c.notes or "").startswith(f"by {how}")
        ]
        if off:
            yield Case.compare(
                f"real/{'-'.join(on.name.split())}/prediction",
                "mean_relative_error",
                "1",
                "lower",
                "what is asked of predictions",
                [(0.15, fmean(off))],
                notes=f"{len(off)} times by {how}; the worst is {max(off):.0%} off",
            )
