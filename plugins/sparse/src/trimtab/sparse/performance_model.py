"""A GPU's time for sparse attention, predicted without one from the times FSA's paper published.

Times add up over the passes of a system. Where a pass is bound by something known, that is not
fitted: compressed attention runs at the rate of the same GPU's dense attention, and vanilla NSA's
selected branch reads its keys and values from the L2 cache. What is left has one coefficient a
pass, none below zero, fitted to blocks of 64 tokens (`published_figures`); blocks of 128 are
unseen by the fit, and `held_out` tells how far off they are; but two earlier forms of the model
were judged by them, so that this is no blind test. Nothing here ran on a GPU of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import exp, hypot, log
from statistics import fmean

import numpy as np
from scipy.optimize import nnls

from trimtab.sparse.published_figures import HEAD_SIZE, HEADS, RATIOS, TIMES, Run, Times

SYSTEMS = ("dense", "nsa", "fsa", "ours")
"""Full attention by Triton, vanilla NSA, FSA as published, and `trimtab.kernels.sparse`."""

_UNIT = 128 * 1024
_STRIDE = 16
_PUBLISHED_LARGEST_GROUP = 8
"""From this group size on the authors' module takes vanilla NSA's forward."""

_READING = 0.05
"""Half a label of figure 4, and what repeated runs may differ by."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What is known of a GPU beforehand, in bytes/s."""

    memory_bytes_per_s: float
    l2_bytes_per_s: float


_H100_L2 = 5.6e12
"""An H100's, from a kernel that does little else: 49 ms at 128K tokens in 4 KV heads."""

GPUS: Mapping[str, Gpu] = {
    "h200": Gpu(4.8e12, _H100_L2),
    "h20": Gpu(4.0e12, _H100_L2 * 78 / 132),  # of as many multiprocessors
}

LAUNCH_S = 5e-6
"""Of a small kernel."""
_LAUNCHES = 25
"""Kernels of one segment of ours: its index tables in torch, the main pass and the merge."""
_TABLE_BYTES = 300
"""Memory traffic of ours to sort one choice of a block: eight passes of a radix sort."""
_WORKSPACE_BYTES = 256 * 2**20
_BACKWARD_ROWS = 32
_BACKWARD_STEP_S = 2e-6
"""Of one tile of our backward; the most popular block is one program, and so a chain of them."""

Terms = Mapping[str, float]


def _forward_terms(system: str, run: Run) -> Terms:
    """How often each fitted pass is done, as a multiple of 128K tokens in 64 KV heads."""
    n, kv_share = run.tokens / _UNIT, 1 / run.group
    terms = {"rank": kv_share * n**2, "rank_long": kv_share * n**3}
    if system == "fsa" and run.group < _PUBLISHED_LARGEST_GROUP:
        terms["tables"] = kv_share * n**2 * 64 / run.block
        terms["parts"] = n * run.top / 16
    return terms


def _forward_known(dense_s: float, system: str, run: Run) -> float:
    n, kv_heads = run.tokens / _UNIT, HEADS / run.group
    known = dense_s * n**2 / _STRIDE
    if "parts" not in _forward_terms(system, run):
        read = 4 * run.tokens * kv_heads * run.block * run.top * HEAD_SIZE
        known += read / GPUS[run.gpu].l2_bytes_per_s
    return known


def _backward_terms(system: str, run: Run) -> Terms:
    n, kv_share = run.tokens / _UNIT, 1 / run.group
    work = n * run.block * run.top / 1024
    terms = {"compressed_backward": n**2, "calls": kv_share}
    if system == "fsa":
        return {**terms, "fsa_backward": work}
    return {**terms, "nsa_keys": work, "nsa_queries": work * kv_share}


@dataclass(frozen=True, slots=True)
class Example:
    """A published time, and how far off its reading may be, relatively."""

    system: str
    run: Run
    both: bool
    seconds: float
    deviation: float


@dataclass(frozen=True, slots=True)
class Model:
    """Seconds by system on one GPU, for 64 heads of dimension 128 and one sequence."""

    gpu: str
    dense: Times
    """At 128K tokens; it grows with the square."""
    seconds: Terms
    """Of each fitted pass, once."""

    def forward_s(self, system: str, run: Run) -> float:
        """Of the forward pass, all branches.

        Args:
            system: one of `SYSTEMS`.
            run: what is run.
        """
        if system == "dense":
            return self.dense.forward * (run.tokens / _UNIT) ** 2
        if system == "ours":
            return self._our_forward_s(run)
        fitted = _sum(self.seconds, _forward_terms(system, run))
        return _forward_known(self.dense.forward, system, run) + fitted

    def both_s(self, system: str, run: Run) -> float:
        """Of forward and backward together."""
        if system == "dense":
            return self.dense.both * (run.tokens / _UNIT) ** 2
        if system == "ours":
            return self._our_forward_s(run) + self._our_backward_s(run)
        return self.forward_s(system, run) + _sum(self.seconds, _backward_terms(system, run))

    def _our_forward_s(self, run: Run) -> float:
        """Compressed attention, the choice, index tables, and parts with their merge.

        The choice takes the logits of compressed keys again, once for their sum and once for each
        entry that overlaps a block. Parts are rated as the published ones are, by their bytes:
        queries once instead of twice, and two statistics more.
        """
        compressed = self.dense.forward * (run.tokens / _UNIT) ** 2 / _STRIDE
        entries = run.block / _STRIDE
        choice = compressed / 2 * (1 + (entries + 1) / entries)
        share = (6 * HEAD_SIZE + 16) / (8 * HEAD_SIZE)
        parts = share * self.seconds["parts"] * run.tokens / _UNIT * run.top / 16
        return compressed + choice + self._our_tables_s(run, 2 * HEAD_SIZE + 8) + parts

    def _our_backward_s(self, run: Run) -> float:
        """As many bytes a choice as the published backward, and its most popular block's chain."""
        n = run.tokens / _UNIT
        chain = run.tokens * run.group / _BACKWARD_ROWS * _BACKWARD_STEP_S
        blocks = max(chain, self.seconds["fsa_backward"] * n * run.block * run.top / 1024)
        return (
            self.seconds["compressed_backward"] * n**2
            + blocks
            + self._our_tables_s(run, 4 * HEAD_SIZE)
        )

    def _our_tables_s(self, run: Run, bytes_per_part: int) -> float:
        choices = HEADS / run.group * run.tokens * run.top
        segments = -(-HEADS * run.tokens * run.top * bytes_per_part // _WORKSPACE_BYTES)
        sorting = choices * _TABLE_BYTES / GPUS[run.gpu].memory_bytes_per_s
        return sorting + segments * _LAUNCHES * LAUNCH_S


def _sum(seconds: Terms, terms: Terms) -> float:
    return sum(seconds[name] * times for name, times in terms.items())


def examples(gpu: str, block: int) -> list[Example]:
    """What was published for blocks of a size: tables, and figure 4 as seconds.

    The figure tells ratios; dense attention's time, which is sure to grow with the square, makes
    seconds of them.
    """
    dense = _dense(gpu).both
    found = [
        Example(system, run, both, times[both], _READING)
        for (run, system), times in TIMES.items()
        if system != "dense" and run.gpu == gpu and run.block == block
        for both in (False, True)
    ]
    for run, ratios in RATIOS.items():
        if run.gpu == gpu and run.block == block:
            seconds = dense * (run.tokens / _UNIT) ** 2 / ratios.over_dense
            blurred = hypot(_READING, _READING / ratios.over_dense)
            more = hypot(blurred, _READING / ratios.over_nsa)
            found.append(Example("fsa", run, True, seconds, blurred))
            found.append(Example("nsa", run, True, seconds * ratios.over_nsa, more))
    return found


def _dense(gpu: str) -> Times:
    """At 128K tokens: the geometric mean over the table's rows, scaled by the square."""
    rows = [(r, t) for (r, system), t in TIMES.items() if system == "dense" and r.gpu == gpu]
    forward, both = (
        exp(fmean(log(times[at] / (run.tokens / _UNIT) ** 2) for run, times in rows))
        for at in (0, 1)
    )
    return Times(forward, both)


def least_squares(rows: Sequence[Terms], targets: Sequence[float]) -> dict[str, float]:
    """Coefficients of terms, none below zero, whose sums come closest to the targets."""
    names = sorted({name for row in rows for name in row})
    matrix = np.array([[row.get(name, 0.0) for name in names] for row in rows])
    return dict(zip(names, map(float, nnls(matrix, np.asarray(targets))[0]), strict=True))


def _fitted(
    found: Iterable[Example],
    terms: Callable[[str, Run], Terms],
    known: Callable[[Example], float],
) -> dict[str, float]:
    """Fits relative errors, each weighed by how sure its example is."""
    rows, targets = [], []
    for example in found:
        weight = 1 / (example.deviation * example.seconds)
        of = terms(example.system, example.run)
        rows.append({name: value * weight for name, value in of.items()})
        targets.append((example.seconds - known(example)) * weight)
    return least_squares(rows, targets)


def fit(gpu: str, found: Sequence[Example]) -> Model:
    """The forward passes from forward times, then the backward ones from times of both."""
    dense = _dense(gpu)
    forward = _fitted(
        (e for e in found if not e.both),
        _forward_terms,
        lambda e: _forward_known(dense.forward, e.system, e.run),
    )
    half = Model(gpu, dense, forward)
    backward = _fitted(
        (e for e in found if e.both), _backward_terms, lambda e: half.forward_s(e.system, e.run)
    )
    return Model(gpu, dense, forward | backward)


@cache
def model(gpu: str) -> Model:
    """The model of one of `GPUS`, fitted to what was published for blocks of 64 tokens."""
    return fit(gpu, examples(gpu, 64))


def errors(fitted: Model, found: Iterable[Example]) -> list[float]:
    """Relative errors of predictions, signed."""
    return [
        (fitted.both_s if e.both else fitted.forward_s)(e.system, e.run) / e.seconds - 1
        for e in found
    ]


def calibration(gpu: str) -> list[float]:
    """Errors on what the model was fitted to, signed."""
    return errors(model(gpu), examples(gpu, 64))


def held_out(gpu: str) -> list[float]:
    """Errors on what the fit has not seen: blocks of 128 tokens, signed."""
    return errors(model(gpu), examples(gpu, 128))


def across_groups(gpu: str) -> list[float]:
    """Errors on the latencies of tables 6 and 7 for group sizes that a fit has not seen, signed.

    Half of the group sizes is fitted, the other half predicted, and the other way round.
    """
    found = examples(gpu, 64)
    wrong = []
    for seen in ((1, 4), (2, 8)):
        fitted = fit(gpu, [e for e in found if e.run.group in seen])
        wrong += errors(
            fitted, (e for e in found if e.run.group not in seen and e.run.tokens >= _UNIT)
        )
    return wrong


def right_winners(gpu: str, least: float = 1.1) -> tuple[int, int]:
    """In how many published pairs of systems the model names the faster one, and how many are told.

    Args:
        gpu: one of `GPUS`.
        least: ratio of two times from which on one counts as faster.
    """
    right = told = 0
    for run, ratios in RATIOS.items():
        if run.gpu == gpu:
            times = {s: model(gpu).both_s(s, run) for s in ("fsa", "nsa", "dense")}
            for rival, ratio in (("nsa", ratios.over_nsa), ("dense", ratios.over_dense)):
                if max(ratio, 1 / ratio) > least:
                    told += 1
                    right += (times[rival] > times["fsa"]) == (ratio > 1)
    for run in {r for r, _ in TIMES if r.gpu == gpu}:
        for both in (False, True):
            predict = model(gpu).both_s if both else model(gpu).forward_s
            for a, b in (("fsa", "nsa"), ("fsa", "dense"), ("nsa", "dense")):
                published = TIMES[run, b][both] / TIMES[run, a][both]
                if max(published, 1 / published) > least:
                    told += 1
                    right += (predict(b, run) > predict(a, run)) == (published > 1)
    return right, told
