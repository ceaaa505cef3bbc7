"""``trimtab emit``: the files that start what a plan says."""

from __future__ import annotations

from pathlib import Path

import typer


def emit(
    plan: Path = typer.Argument(help="A plan file."),
    to: str = typer.Option(..., help="vllm, deepspeed, torchrun, slurm, kubernetes, mpi or msccl."),
    out: Path | None = typer.Option(None, help="A folder for the files; else they are printed."),
    json_: bool = typer.Option(False, "--json", help="Print one JSON object: content by name."),
) -> None:
    """Write the files that start a plan with one of these tools."""
    import json

    from trimtab.core.emitters import emit as files_for
    from trimtab.core.folders import write_folder
    from trimtab.core.plan import Plan

    files = files_for(Plan.read(plan), to)
    if out is not None:
        write_folder(out, files)
    if json_:
        typer.echo(json.dumps(files, indent=2))
    elif out is None:
        typer.echo("\n".join(f"# ---- {name}\n{text}" for name, text in files.items()), nl=False)
    else:
        typer.echo("\n".join(str(out / name) for name in files))
