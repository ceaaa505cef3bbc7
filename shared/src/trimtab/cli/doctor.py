"""``trimtab doctor``: what is installed, which hooks are live, what is wrong and how to mend it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import typer
from pydantic import BaseModel

from trimtab.cli.checks.finding import Finding, Level, warning

if TYPE_CHECKING:
    from rich.text import Text

Check = Callable[[], list[Finding]]

ERROR_STATUS = 2


class Diagnosis(BaseModel):
    """What ``trimtab doctor --json`` prints."""

    version: str
    errors: int
    warnings: int
    findings: list[Finding]


def doctor(
    json_: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Say what is installed, which hooks are live, what is wrong and how to mend it.

    The exit status is 2 when something will fail, 0 otherwise.
    """
    from trimtab.cli.console import chatter_on_stderr
    from trimtab.core.progress import progress_bar

    with chatter_on_stderr(), progress_bar() as progress:
        progress("looking at what is installed")
        diagnosis = diagnose(all_checks())
    if json_:
        typer.echo(diagnosis.model_dump_json(indent=2))
    else:
        _print(diagnosis)
    if diagnosis.errors:
        raise typer.Exit(ERROR_STATUS)


def all_checks() -> Sequence[Check]:
    """The checks in the order in which their findings are shown."""
    from trimtab.cli.checks import frameworks, machine, plugins, torch_build, vllm_setup

    return (
        machine.python,
        machine.cache_room,
        plugins.twice,
        plugins.imports,
        frameworks.verified,
        torch_build.companions,
        torch_build.stale_build_locks,
        vllm_setup.twice,
        vllm_setup.script,
        vllm_setup.plugin_list,
        vllm_setup.host,
    )


def diagnose(checks: Sequence[Check]) -> Diagnosis:
    """Makes all checks at once; one that fails is a warning of its own."""
    from importlib.metadata import version

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        findings = [finding for found in pool.map(_safely, checks) for finding in found]
    levels = [finding.level for finding in findings]
    return Diagnosis(
        version=version("trimtab-core"),
        errors=levels.count(Level.ERROR),
        warnings=levels.count(Level.WARNING),
        findings=findings,
    )


def _safely(check: Check) -> list[Finding]:
    try:
        return check()
    except Exception as error:
        what = f"a check could not be made ({type(error).__name__}: {error})"
        return [warning("doctor", what, "report it as a fault of trimtab")]


def _print(diagnosis: Diagnosis) -> None:
    from rich.console import Console

    # Not widened where stdout is no terminal: these are sentences, and soft_wrap keeps them whole.
    console = Console()
    for finding in diagnosis.findings:
        console.print(_line(finding), soft_wrap=True)
    counts = f"{diagnosis.errors} errors, {diagnosis.warnings} warnings"
    console.print(f"trimtab {diagnosis.version}: {counts}", soft_wrap=True, highlight=False)


def _line(finding: Finding) -> Text:
    from rich.text import Text

    marks = {Level.OK: ("ok     ", "green"), Level.WARNING: ("warning", "yellow")}
    mark = marks.get(finding.level, ("error  ", "bold red"))
    remedy = f"\n         → {finding.fix}" if finding.fix else ""
    return Text.assemble(mark, f"  {finding.check}: {finding.what}{remedy}")
