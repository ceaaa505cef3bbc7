"""A GPU's time for sparse attention, predicted without one from the times FSA's paper published.

Times add up over the passes of a system. Where a pass is bound by something known, that is not
fitted: compressed attention runs at the rate of the same GPU's dense attention, forward and
backward, and vanilla NSA's selected branch reads its keys and values from the L2 cache. What is
left has one coefficient a pass, none below zero, fitted to one half of what was published
(`published_figures`) and tested on the other. The halves are a chequerboard of group sizes, lengths
and block sizes, so that each has its neighbours in the other; `unseen_blocks` is the harder test.
The passes were chosen with the figures at hand, so that neither is blind. Nothing here ran on a GPU
of ours, whose kernels are rated by their bytes (`traffic`) at the speed of the published ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import exp, hypot, log, log2
from statistics import fmean

import numpy as np
from scipy.optimize import nnls

from trimtab.core.errors import BadInput
from trimtab.sparse import traffic
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
COMPRESSED_LAUNCHES, CHOICE_LAUNCHES = 3, 4
"""Kernels of compressed attention, and of the choice by what that has summed up."""
CALL_LAUNCHES, TABLE_LAUNCHES = 5, 6
"""Kernels that lay out a call's queries, blocks and tiles; and those that make a table and its work
items, of which torch's sum takes two."""
_AGAIN_PROGRAM_S, _AGAIN_AT_ONCE = 1e-6, 2 * 132
"""Of a program that reads that no head of its tile has to be done again, and how many an H100 runs
at once."""
_COUNT_QUERY_S = 0.3e-6
"""A program that counts goes through its queries one by one, and waits for the L2 cache twice."""
_COUNTING = 32 * 132
"""Such programs at once, of a warp each, where the L2 cache is an H100's."""
_FORWARD_LAUNCHES, _BACKWARD_LAUNCHES = 3, 4
"""Of a segment."""

NEAR_UNTIL: Mapping[int, int] = {64: 3584, 128: 1664}
"""Token from which on queries have far blocks, by the tokens of a block; a query has 1024 of them,
and heads are of 128 in bfloat16."""
_LARGEST_GROUP = 32
"""Of heads whose queries fit a tile of the way by queries."""
NEAR_ROWS = 64
"""Of a program that joins parts."""

FORWARD_CHUNK, BACKWARD_CHUNK, BACKWARD_BLOCK = 512, 2048, 64
"""Rows of our programs at most, for heads of 128 in bfloat16, and the backward's largest block."""
_BACKWARD_CHAIN_S = BACKWARD_CHUNK / 32 * 2e-6
"""The longest program of our backward, a tile of 32 rows after the other."""

_PUBLISHED_ROWS = 128 * 8
"""What a program of the published forward takes of a block's queries, and reads its keys for."""
_PUBLISHED_PART_BYTES = 6 * HEAD_SIZE * 17 / 16 + 4 * HEAD_SIZE * 64 / _PUBLISHED_ROWS
"""Of a query, head and block in the published forward but its maxima, for 16 blocks of 64 tokens:
the query, its part, and that read again (FSA, appendix E: ``6 d h N (1 + T)``); keys and values."""
_PUBLISHED_BACKWARD_BYTES = 12 * HEAD_SIZE
"""The same of the backward: queries and gradients for dK and dV, again for dQ, and its parts."""

Terms = Mapping[str, float]


def _forward_terms(system: str, run: Run) -> Terms:
    """How often each fitted pass is done, as a multiple of 128K tokens in 64 KV heads.

    The choice of blocks grows with the cube, for no reason that the paper tells.
    """
    n, kv_share = run.tokens / _UNIT, 1 / run.group
    terms = {"rank": kv_share * n**3}
    if _has_own_forward(system, run):
        terms["maxima"] = kv_share * n * run.block * run.top / 1024
        terms["parts"] = n * run.top / 16
    return terms


def _has_own_forward(system: str, run: Run) -> bool:
    return system == "fsa" and run.group < _PUBLISHED_LARGEST_GROUP


def _forward_known(dense_s: float, system: str, run: Run) -> float:
    n, kv_heads = run.tokens / _UNIT, HEADS / run.group
    known = dense_s * n**2 / _STRIDE
    if not _has_own_forward(system, run):
        read = 4 * run.tokens * kv_heads * run.block * run.top * HEAD_SIZE
        known += read / GPUS[run.gpu].l2_bytes_per_s
    return known


def _backward_terms(system: str, run: Run) -> Terms:
    """Larger blocks cost more in either: the sums dK and dV of 128 tokens fill all registers.

    FSA's authors call their kernels once a KV head.
    """
    n, kv_share = run.tokens / _UNIT, 1 / run.group
    work = n * run.block * run.top / 1024
    terms = {"large_blocks": n * (run.block / 64 - 1)}
    if system == "fsa":
        return {**terms, "fsa_backward": work, "calls": kv_share}
    return {**terms, "nsa_keys": work, "nsa_queries": work * kv_share}


def _backward_known(dense: Times, run: Run) -> float:
    return (dense.both - dense.forward) * (run.tokens / _UNIT) ** 2 / _STRIDE


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
        """Of the forward pass.

        Ours is compressed attention, the choice and the selected branch; a sliding window and the
        gates come on top.

        Args:
            system: one of `SYSTEMS`.
            run: what is run.

        Raises:
            BadInput: there is no such system, or no published time of the run's GPU or block.
        """
        self._check(system, run)
        if system == "dense":
            return self.dense.forward * (run.tokens / _UNIT) ** 2
        if system == "ours":
            return self._our_forward_s(run)
        fitted = _sum(self.seconds, _forward_terms(system, run))
        return _forward_known(self.dense.forward, system, run) + fitted

    def both_s(self, system: str, run: Run) -> float:
        """Of forward and backward together; see `forward_s`."""
        self._check(system, run)
        if system == "dense":
            return self.dense.both * (run.tokens / _UNIT) ** 2
        if system == "ours":
            return self._our_forward_s(run) + self._our_backward_s(run)
        backward = _backward_known(self.dense, run) + _sum(
            self.seconds, _backward_terms(system, run)
        )
        return self.forward_s(system, run) + backward

    def _check(self, system: str, run: Run) -> None:
        for name, given, known in (
            ("system", system, SYSTEMS),
            ("run.gpu", run.gpu, (self.gpu,)),
            ("run.block", run.block, tuple(NEAR_UNTIL)),
        ):
            if given not in known:
                raise _unknown(name, given, known)
        for name, number in (("tokens", run.tokens), ("group", run.group), ("top", run.top)):
            if number < 1:
                raise BadInput(
                    f"{name} is {number}", where="run", fix="give a whole number from 1 on"
                )

    def _our_forward_s(self, run: Run) -> float:
        """Compressed attention, the choice, and the selected branch.

        The choice takes the logits of compressed keys again, of each block that an entry overlaps;
        their sum is the attention's.
        """
        compressed = self.dense.forward * (run.tokens / _UNIT) ** 2 / _STRIDE
        entries = run.block / _STRIDE
        choice = compressed / 2 * (entries + 1) / entries
        started = (COMPRESSED_LAUNCHES + CHOICE_LAUNCHES) * LAUNCH_S + self._again_s(run)
        way = "queries" if goes_by_queries(run) else "blocks"
        return compressed + choice + started + self.our_selected_s(run)[way]

    def our_selected_s(self, run: Run) -> Terms:
        """Of our selected branch's forward, by blocks and by queries."""
        of, gpu = _sizes(run), GPUS[run.gpu]
        lists = traffic.lists(of, of.forward_part_bytes, FORWARD_CHUNK)
        panels = traffic.by_query_panel_bytes(of, lists) / gpu.l2_bytes_per_s
        beside = traffic.by_query_bytes(of) / gpu.memory_bytes_per_s
        return {"blocks": self._by_blocks_s(run), "queries": panels + beside}

    @property
    def parts_bytes_per_s(self) -> float:
        """At which the published main kernel and merge move their bytes."""
        return _PUBLISHED_PART_BYTES * HEADS * _UNIT * 16 / self.seconds["parts"]

    def _again_s(self, run: Run) -> float:
        """Of a launch for all tiles of queries whose programs find nothing to do again."""
        at_once = _AGAIN_AT_ONCE * GPUS[run.gpu].l2_bytes_per_s / _H100_L2
        return run.tokens / NEAR_ROWS / at_once * _AGAIN_PROGRAM_S

    def _by_blocks_s(self, run: Run) -> float:
        """What is near at the rate of dense attention, and parts of what is far if anything is."""
        of = replace(_sizes(run), near_until=NEAR_UNTIL[run.block])
        bytes_per_s = self.parts_bytes_per_s
        indices = traffic.near_index_bytes(of, run.tokens / NEAR_ROWS * HEADS)
        near = self.dense.forward * traffic.near_keys(of) / (_UNIT**2 / 2)
        joined = near + indices / bytes_per_s
        if run.tokens <= NEAR_UNTIL[run.block]:
            started = (CALL_LAUNCHES - 1 + _FORWARD_LAUNCHES - 1) * LAUNCH_S
            return joined + started + self._again_s(run)
        lists = traffic.lists(of, of.forward_part_bytes, FORWARD_CHUNK)
        joined += lists.slices * self._again_s(run)
        parts = traffic.forward_bytes(of, lists) / bytes_per_s
        copied = traffic.far_bytes(of) / GPUS[run.gpu].memory_bytes_per_s
        return joined + parts + copied + self._tables_s(run.gpu, of, lists, _FORWARD_LAUNCHES)

    def _our_backward_s(self, run: Run) -> float:
        """Compressed attention's, and the selected branch's by its bytes."""
        block = min(run.block, BACKWARD_BLOCK)
        of = replace(_sizes(run), block=block, top=run.top * run.block // block)
        part_bytes = of.backward_part_bytes(BACKWARD_CHUNK)
        lists = traffic.lists(of, part_bytes, BACKWARD_CHUNK)
        published = _PUBLISHED_BACKWARD_BYTES * HEADS * _UNIT * 16
        bytes_per_s = published / self.seconds["fsa_backward"]
        selected = max(
            traffic.backward_bytes(of, lists) / bytes_per_s, lists.segments * _BACKWARD_CHAIN_S
        )
        beside = traffic.torch_bytes(of) / GPUS[run.gpu].memory_bytes_per_s
        tables = self._tables_s(run.gpu, of, lists, _BACKWARD_LAUNCHES)
        return _backward_known(self.dense, run) + selected + beside + tables

    def _tables_s(self, gpu: str, of: traffic.Sizes, lists: traffic.Lists, launches: int) -> float:
        """Of all tables of a call: their bytes, their launches, and the counting of queries."""
        of_gpu, queries = GPUS[gpu], of.tokens * of.kv_heads
        at_once = _COUNTING * of_gpu.l2_bytes_per_s / _H100_L2
        started = CALL_LAUNCHES + lists.lots * TABLE_LAUNCHES + lists.segments * launches
        moved = traffic.table_bytes(of, lists) / of_gpu.memory_bytes_per_s
        return moved + started * LAUNCH_S + queries / at_once * _COUNT_QUERY_S


def goes_by_queries(run: Run) -> bool:
    """Whether the code does the selected branch by queries, as `selected_plan` has it.

    For heads of 128 in bfloat16; the rates there are an H200's, whatever the GPU.
    """
    of, bytes_per_s = _sizes(run), model("h200").parts_bytes_per_s
    row_bytes = of.d * of.item_bytes + 2 * of.forward_part_bytes + 12
    by_queries_s = of.panel * of.item_bytes / GPUS["h200"].l2_bytes_per_s
    return run.group <= _LARGEST_GROUP and by_queries_s < run.group * row_bytes / bytes_per_s


def _sizes(run: Run) -> traffic.Sizes:
    return traffic.Sizes(
        run.tokens, HEADS // run.group, run.group, HEAD_SIZE, HEAD_SIZE, run.block, run.top
    )


def _sum(seconds: Terms, terms: Terms) -> float:
    return sum(seconds[name] * times for name, times in terms.items())


def examples(gpu: str) -> list[Example]:
    """What was published for a GPU: tables, and figure 4 as seconds.

    The figure tells ratios; dense attention's time, which is sure to grow with the square, makes
    seconds of them.
    """
    dense = _dense(gpu).both
    found = [
        Example(system, run, both, times[both], _READING)
        for (run, system), times in TIMES.items()
        if system != "dense" and run.gpu == gpu
        for both in (False, True)
    ]
    for run, ratios in RATIOS.items():
        if run.gpu == gpu:
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


def fit(gpu: str, found: Iterable[Example]) -> Model:
    """Fits relative errors of forward times and of both passes' at once, the surer the heavier."""
    dense = _dense(gpu)
    rows, targets = [], []
    for example in found:
        system, run = example.system, example.run
        terms, known = _forward_terms(system, run), _forward_known(dense.forward, system, run)
        if example.both:
            terms = {**terms, **_backward_terms(system, run)}
            known += _backward_known(dense, run)
        weight = 1 / (example.deviation * example.seconds)
        rows.append({name: times * weight for name, times in terms.items()})
        targets.append((example.seconds - known) * weight)
    return Model(gpu, dense, least_squares(rows, targets))


def is_calibration(run: Run) -> bool:
    """Whether a run's times are of the half that the model is fitted to: every other one."""
    return round(log2(run.group) + log2(run.tokens) + log2(run.block)) % 2 == 1


def _unknown(name: str, given: object, known: Iterable[object]) -> BadInput:
    choices = ", ".join(map(repr, known))
    return BadInput(f"{name} {given!r} is not known to the model", fix=f"give one of {choices}")


@cache
def model(gpu: str) -> Model:
    """The model of one of `GPUS`, fitted to half of what was published.

    Raises:
        BadInput: it is none of them.
    """
    if gpu not in GPUS:
        raise _unknown("gpu", gpu, GPUS)
    return fit(gpu, (e for e in examples(gpu) if is_calibration(e.run)))


def errors(fitted: Model, found: Iterable[Example]) -> list[float]:
    """Relative errors of predictions, signed."""
    return [
        (fitted.both_s if e.both else fitted.forward_s)(e.system, e.run) / e.seconds - 1
        for e in found
    ]


def calibration(gpu: str) -> list[float]:
    """Errors on what the model was fitted to, signed."""
    return errors(model(gpu), (e for e in examples(gpu) if is_calibration(e.run)))


def held_out(gpu: str) -> list[float]:
    """Errors on the half that the fit has not seen, signed."""
    return errors(model(gpu), (e for e in examples(gpu) if not is_calibration(e.run)))


def across_groups(gpu: str) -> list[float]:
    """Errors for group sizes that a fit has not seen, signed.

    Half of the group sizes is fitted, the other half predicted, and the other way round.
    """
    found = examples(gpu)
    wrong = []
    for seen in ((1, 4), (2, 8)):
        fitted = fit(gpu, (e for e in found if e.run.group in seen))
        wrong += errors(fitted, (e for e in found if e.run.group not in seen))
    return wrong


def unseen_blocks(gpu: str) -> list[float]:
    """Errors for blocks of 128 tokens of a fit to those of 64 alone, signed."""
    found = examples(gpu)
    fitted = fit(gpu, (e for e in found if e.run.block == 64))
    return errors(fitted, (e for e in found if e.run.block == 128))


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
