"""``trimtab bench sparse-static``: what can be told of the GPU kernels without a GPU.

They are compiled for real targets and counted, and a model of times predicts them beside dense
attention, vanilla NSA and FSA as published. Nothing here was measured on a GPU of ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import fmean
from typing import Literal

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.hosts.vllm.prefills import LayerShape
from trimtab.kernels.sparse.configurations import Configuration, configuration, shipped
from trimtab.kernels.sparse.gpu_tiles import Tile
from trimtab.kernels.sparse.selectors import Selection
from trimtab.kernels.sparse.static_report import TARGETS, Resources, measure
from trimtab.sparse.gpu_plan import plan_on_gpu
from trimtab.sparse.performance_model import (
    GPUS,
    SYSTEMS,
    across_groups,
    calibration,
    held_out,
    model,
    right_winners,
    unseen_blocks,
)
from trimtab.sparse.published_figures import HEAD_SIZE, TIMES, Run

Job = tuple[str, Configuration]

_FLASH_TILES = (Tile(128, 8, 2, 64), Tile(128, 8, 3, 64), Tile(128, 4, 2, 64))
"""Of dense flash attention, beside the one in which spans are shipped."""


def run(options: Options, progress: Progress) -> list[Case]:
    """Resources of every kernel and target, their densities, and the model's times and errors.

    ``quick`` compiles for one target, type, head size and block.
    """
    jobs = [
        (target, one)
        for target, to in TARGETS.items()
        for one in shipped(to.backend)
        if not options.quick or (target == "sm_90" and "/bf16/d-128-128/block-64" in one.name)
    ]
    mains = [job for job in jobs if job[1].kernel == "forward" and job[1].dtype == "bf16"]
    rivals = [rival for job in mains for rival in _flash(*job)]
    found = _measured(list(dict.fromkeys([*jobs, *rivals])), progress)
    return [
        *(_resources(*job, found[job]) for job in jobs),
        *_densities(found),
        *_errors(),
        *_times(options.quick),
        *_prefills(options.quick),
    ]


def _measured(jobs: list[Job], progress: Progress) -> Mapping[Job, Resources]:
    found = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        counted = pool.map(lambda job: measure(job[1], job[0]), jobs)
        for number, (job, used) in enumerate(zip(jobs, counted, strict=True), 1):
            progress(f"compiled {job[1].name} for {job[0]}", number / len(jobs))
            found[job] = used
    return found


def _case(
    case: str,
    metric: str,
    unit: str,
    better: Literal["lower", "higher"],
    baseline: str,
    values: tuple[float, float],
    notes: str | None = None,
    error: float = 0.0,
) -> Case:
    """The baseline's value and ours; the ratio may be off by a relative error."""
    of = Case.compare(case, metric, unit, better, baseline, [values], notes=notes)
    low, high = of.ratio / (1 + error), of.ratio * (1 + error)
    return of.model_copy(update={"ratio_low": low, "ratio_high": high})


def _resources(target: str, of: Configuration, used: Resources) -> Case:
    most = TARGETS[target].registers_at(of.tile.warps)
    return _case(
        f"model/{target}/{of.name}",
        "registers",
        "1",
        "lower",
        "what a thread can have",
        (most, used.registers),
        f"{used.spilled_bytes} B spilled, {used.shared_bytes} B shared,"
        f" {used.tensor_instructions} tensor instructions of {used.instructions}",
    )


def _flash(target: str, of: Configuration) -> list[Job]:
    """Dense flash attention for heads as large, which is a span over all keys, in likely tiles."""
    span = configuration("span", of.backend, of.head_size, of.dtype)
    return [(target, replace(span, tile=tile)) for tile in (span.tile, *_FLASH_TILES)]


def _densities(found: Mapping[Job, Resources]) -> Iterator[Case]:
    """The main kernel's work against that of the densest flash attention that does not spill."""
    for (target, of), used in found.items():
        if (of.kernel, of.dtype) != ("forward", "bf16"):
            continue
        rivals = [found[job] for job in _flash(target, of)]
        room = TARGETS[target].shared_bytes
        fit = [r for r in rivals if not r.spilled_bytes and r.shared_bytes <= room]
        dense = max((r.density for r in fit), default=0.0)
        if dense:
            d, d_v = of.head_size
            yield _case(
                f"model/{target}/density/{of.dtype}/d-{d}-{d_v}/block-{of.block}",
                "tensor_flop_per_instruction",
                "FLOP",
                "higher",
                "the densest flash attention that does not spill, the same target",
                (dense, used.density),
                "for each instruction of a warp in the main loop",
            )


def _errors() -> Iterator[Case]:
    """Mean relative errors of the model, against what is asked of it."""
    for gpu in GPUS:
        for name, wrong, asked, of in (
            ("calibration", calibration(gpu), 0.08, "the half of all that it was fitted to"),
            ("held-out", held_out(gpu), 0.15, "the other half; not blind, see its module"),
            ("across-groups", across_groups(gpu), 0.15, "group sizes that a fit had not seen"),
            ("unseen-blocks", unseen_blocks(gpu), 0.15, "blocks of 128, by a fit to those of 64"),
        ):
            sizes = [abs(x) for x in wrong]
            yield _case(
                f"model/{gpu}/error/{name}",
                "mean_relative_error",
                "1",
                "lower",
                "what is asked of the model",
                (asked, fmean(sizes)),
                f"{len(sizes)} figures: {of}; the worst is {max(sizes):.0%} off",
            )
        right, told = right_winners(gpu)
        yield _case(
            f"model/{gpu}/right-winners",
            "share",
            "1",
            "higher",
            "what is asked of the model",
            (0.95, right / told),
            f"of {told} published pairs that differ by a tenth",
        )


def _times(quick: bool) -> Iterator[Case]:
    for gpu in GPUS:
        error = fmean(abs(x) for x in held_out(gpu))
        for thousands in (128,) if quick else (8, 32, 64, 128, 256):
            for group in (1, 4) if quick else (1, 2, 4, 8):
                for block in (64,) if quick else (64, 128):
                    of = Run(gpu, thousands * 1024, group, block, 1024 // block)
                    yield from _rivals(of, error)


def _prefills(quick: bool) -> Iterator[Case]:
    """What the plan for vLLM's prefills chooses, against the dense attention beneath."""
    for dense in ("FLASH_ATTN", "TRITON_ATTN"):
        layers = LayerShape(32, 8, HEAD_SIZE, 16, 9, dense)
        for thousands in (32,) if quick else (4, 8, 32, 128):
            for selection in (Selection("mass"), Selection("top")):
                tokens = thousands * 1024
                found = plan_on_gpu(tokens, tokens, layers, selection)
                yield _case(
                    f"model/h200/prefill/{thousands}K/{selection.selector}/over-{dense}",
                    "layer_time",
                    "s",
                    "lower",
                    f"dense attention by {dense}",
                    (found.dense_s, found.chosen_s),
                    f"all predicted; {found.explain()}",
                )


def _rivals(of: Run, error: float) -> Iterator[Case]:
    predicted = model(of.gpu)
    where = f"{of.gpu}/{of.tokens // 1024}K/group-{of.group}/block-{of.block}"
    for both, way, predict in (
        (0, "forward", predicted.forward_s),
        (1, "forward-and-backward", predicted.both_s),
    ):
        ours = predict("ours", of)
        for rival in SYSTEMS[:-1]:
            known = TIMES.get((of, rival))
            said = f"; published {known[both]} s" if known else ""
            yield _case(
                f"model/{where}/{way}",
                "time",
                "s",
                "lower",
                _NAMES[rival],
                (predict(rival, of), ours),
                f"all predicted{said}; the model is {error:.0%} off where it was not fitted",
                error,
            )


_NAMES = {
    "dense": "full attention by Triton",
    "nsa": "vanilla NSA",
    "fsa": "FSA as published",
}
