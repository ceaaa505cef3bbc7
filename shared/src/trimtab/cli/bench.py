"""``trimtab bench``: runs a benchmark of the core or of a plugin, or lists them."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trimtab.core.errors import BadInput

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from trimtab.core.benchmark import Benchmark, Case, Report

BUILT_IN = {
    "cost": "trimtab.core.cost.bench:BENCHMARK",
    "host": "trimtab.hosts.vllm.host_bench:HOST",
    "simulator": "trimtab.hosts.vllm.simulator_bench:SIMULATOR",
}


def bench(
    name: str | None = typer.Argument(
        None,
        help="The benchmark; without it, they are listed.",
        autocompletion=lambda: _names(_contributed()),
    ),
    json_: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
    quick: bool = typer.Option(False, "--quick", help="Fewer cases, in under 60 s."),
    seed: int = typer.Option(0, min=0, help="Seed of whatever is drawn at random."),
    out: Path | None = typer.Option(None, help="Also write the JSON object to this file."),
) -> None:
    """Run a benchmark against its baselines; without a name, list them."""
    from trimtab.cli.console import chatter_on_stderr, print_out

    if name is None:
        with chatter_on_stderr():
            found = list(_all())
        _print_list(found, json_)
        return
    if out is not None:
        _check_writable(out)
    with chatter_on_stderr():
        result = _run(name, quick, seed)
    text = result.model_dump_json(indent=2, exclude_none=True)
    if out is not None:
        from trimtab.core.documents import write_atomic

        write_atomic(out, f"{text}\n")
    if json_:
        typer.echo(text)
    else:
        print_out(_table(result))


def _run(name: str, quick: bool, seed: int) -> Report:
    from trimtab.core.benchmark import Options, report
    from trimtab.core.progress import progress_bar

    try:
        benchmark = _named(name)
        with progress_bar() as progress:
            return report(benchmark, Options(seed=seed, quick=quick), progress)
    except ModuleNotFoundError as error:
        raise _needs(name, error) from None


def _named(name: str) -> Benchmark:
    if name in BUILT_IN:
        return _load(BUILT_IN[name])
    contributed = _contributed()
    if name not in contributed:
        known = ", ".join(_names(contributed))
        raise BadInput(f"there is no benchmark {name!r}", fix=f"known are {known}")
    return contributed[name]


def _names(contributed: dict[str, Benchmark]) -> list[str]:
    return sorted({*BUILT_IN, *contributed})


def _load(reference: str) -> Benchmark:
    module, _, attribute = reference.partition(":")
    benchmark: Benchmark = getattr(import_module(module), attribute)
    return benchmark


def _contributed() -> dict[str, Benchmark]:
    """The plugins' benchmarks by name; a plugin that fails to name its own is left out."""
    from trimtab.core.hooks import discover

    found: dict[str, Benchmark] = {}
    for plugin in discover()[0]:
        try:
            offers = plugin.manager.hook.trimtab_benchmarks()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            typer.echo(f"the plugin {plugin.name!r} names no benchmarks ({reason})", err=True)
        else:
            found.update({benchmark.name: benchmark for offer in offers for benchmark in offer})
    return found


def _needs(name: str, error: ModuleNotFoundError) -> Exception:
    """The error of a benchmark whose framework is not installed."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "trimtab"):
        return error
    return BadInput(
        f"the benchmark {name!r} needs the package {package!r}, which is not installed",
        fix="install it beside trimtab",
    )


def _all() -> list[tuple[str, str]]:
    """Names and summaries of all benchmarks."""
    found = {name: benchmark.summary for name, benchmark in _contributed().items()}
    for name, reference in BUILT_IN.items():
        try:
            found[name] = _load(reference).summary
        except ModuleNotFoundError as error:
            found[name] = f"cannot run here: {_needs(name, error)}"
    return sorted(found.items())


def _print_list(found: list[tuple[str, str]], json_: bool) -> None:
    import json

    from rich.table import Table
    from rich.text import Text

    from trimtab.cli.console import print_out

    if json_:
        rows = [{"name": name, "summary": summary} for name, summary in found]
        typer.echo(json.dumps({"benchmarks": rows}, indent=2))
        return
    table = Table("benchmark", "what it shows", box=None)
    for row in found:
        table.add_row(*map(Text, row))
    print_out(table)


def _table(result: Report) -> Table:
    from rich.table import Table

    bounded = any(case.lower_bound is not None for case in result.cases)
    facts = f"{result.machine.cpu}, {result.machine.cores} cores, seed {result.seed}"
    table = Table(
        title=f"{result.bench}  ({facts})",
        caption="A ratio above 1 means ours is better; in brackets, over repeats or seeds.",
    )
    for heading in ("case", "metric", "baseline"):
        table.add_column(heading, overflow="fold")
    for heading in ("theirs", "ours", "ratio", *(["bound"] if bounded else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for case in result.cases:
        table.add_row(*_row(case, bounded))
    return table


def _row(case: Case, bounded: bool) -> list[Text]:
    from rich.text import Text

    colour = "green" if case.ratio_low > 1 else "red" if case.ratio_high < 1 else ""
    unit = "" if case.unit == "1" else f" ({case.unit})"
    cells = [
        Text(case.case),
        Text(f"{case.metric}{unit}"),
        Text(case.baseline),
        Text(f"{case.baseline_value:.4g}"),
        Text(f"{case.value:.4g}"),
        Text(f"{case.ratio:.2f} ({case.ratio_low:.2f}–{case.ratio_high:.2f})", style=colour),
    ]
    bound = "" if case.lower_bound is None else f"{case.lower_bound:.4g}"
    return cells + ([Text(bound)] if bounded else [])


def _check_writable(out: Path) -> None:
    """Refuses before the run what could not be written after it.

    Raises:
        BadInput: the file's folder is missing or may not be written.
    """
    if out.exists() and not out.is_file() and not out.is_dir():
        return  # a pipe or a device, which is written into wherever it lies
    folder = out.resolve().parent
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}", where=str(out), fix="make it first")
    if out.is_dir() or not os.access(folder, os.W_OK):
        raise BadInput("this cannot be written", where=str(out), fix="give a file you may write")
