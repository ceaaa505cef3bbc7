"""The ``trimtab demo`` command: its options, its progress and what it prints."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import typer

from trimtab.core.errors import BadInput

_NEEDED = {
    "vllm": "vLLM",
    "openai": "trimtab-urgency[demo]",
    "defog_data": "trimtab-urgency[demo]",
}


def demo(
    workflows: int = typer.Option(32, min=2, max=500, help="How many users ask a question."),
    seed: int = typer.Option(0, min=0, help="Seed of who asks what, when, and by when."),
    port: int = typer.Option(
        0, min=0, max=65534, help="The first server's port; the second takes the next. 0: any."
    ),
    model: str | None = typer.Option(None, help="A model to serve instead of the small one."),
    out: Path = typer.Option(Path("trimtab-demo.json"), help="Where all figures are written."),
    json_: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Serve an agent's workflows under vLLM's own order, then by urgency, and compare."""
    for package, remedy in _NEEDED.items():
        if find_spec(package) is None:
            raise BadInput(
                f"the demo needs the package {package!r}, which is not installed",
                fix=f"install {remedy} beside trimtab",
            )
    if not out.resolve().parent.is_dir():
        raise BadInput("there is no such folder", where=str(out), fix="make it first")
    if out.is_dir():
        raise BadInput("this is a folder", where=str(out), fix="give a file")

    from trimtab.core.documents import write_atomic
    from trimtab.core.progress import progress_bar
    from trimtab.urgency import demo as demonstration

    with demonstration.ended_by_signals(), progress_bar() as progress:
        report = demonstration.run(
            workflows=workflows, seed=seed, port=port, model=model, progress=progress
        )
    text = report.model_dump_json(indent=2)
    write_atomic(out, f"{text}\n")
    if json_:
        typer.echo(text)
        return

    from rich.console import Console

    Console().print(demonstration.table(report))
    typer.echo(demonstration.next_steps(report, out))
