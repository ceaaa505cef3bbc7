"""``trimtab profile vllm``: measures the engine that the simulator calculates with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from trimtab.core.cost.step import EngineProfile


def vllm(
    model: str = typer.Option(..., help="A folder with a Hugging Face model, or a model's name."),
    out: Path = typer.Option(..., help="The profile file to write (JSON)."),
    max_num_seqs: int = typer.Option(16, min=1, help="As vLLM's flag."),
    max_num_batched_tokens: int = typer.Option(512, min=1, help="As vLLM's flag."),
    max_model_len: int = typer.Option(2048, min=16, help="As vLLM's flag."),
    engine_args: str = typer.Option(
        "{}", help="Further arguments of vLLM's EngineArgs, e.g. '{\"enforce_eager\": true}'."
    ),
    threads: int | None = typer.Option(None, min=1, help="CPU threads of the engine."),
    rounds: int = typer.Option(3, min=1, help="How often each batch is measured."),
    json_: bool = typer.Option(False, "--json", help="Print the profile on stdout."),
) -> None:
    """Measure the steps of a real vLLM engine and write its profile for `trimtab simulate`."""
    from trimtab.cli.console import chatter_on_stderr, print_out
    from trimtab.core.documents import parse_json
    from trimtab.core.errors import BadInput
    from trimtab.core.progress import progress_bar
    from trimtab.hosts.vllm.profiling import measure_to_file

    further = parse_json(engine_args, where="--engine-args")
    if not isinstance(further, dict):
        raise BadInput("this is no JSON object", where="--engine-args", fix="give {...}")
    limits = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
    }
    with chatter_on_stderr(), progress_bar() as progress:
        profile = measure_to_file(
            model, out, {**limits, **further}, threads=threads, rounds=rounds, progress=progress
        )
    if json_:
        typer.echo(profile.model_dump_json(indent=2))
    else:
        print_out(_table(profile, out))


def _table(profile: EngineProfile, out: Path) -> Table:
    from rich.table import Table

    step = profile.step
    table = Table("part of a step", "cost", title=f"{profile.model} on {profile.device}", box=None)
    for part, seconds in (
        ("each step", step.base_s),
        ("each decoding sequence", step.decode_s),
        ("1,000 context tokens read", step.kv_token_s * 1000),
        ("each prompt or chunk", step.prefill_s),
        ("1,000 prompt tokens", step.prefill_token_s * 1000),
        ("a million query-key pairs", step.prefill_pair_s * 1e6),
    ):
        table.add_row(part, f"{seconds * 1e3:.3f} ms")
    if profile.residuals is not None:
        found = profile.residuals
        table.caption = (
            f"{found.steps} steps, median error {found.median_error:.1%},"
            f" p90 {found.p90_error:.1%}; written to {out}"
        )
    return table
