"""The ``trimtab tune urgency`` command: its options, its watch and what it writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trimtab.core.errors import BadInput

if TYPE_CHECKING:
    from trimtab.core.cost.step import EngineProfile
    from trimtab.urgency.config import TunedOptions
    from trimtab.urgency.tuning import Tuning

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_NICE = 10


def urgency(
    trace: Path = typer.Option(..., help="The requests: one JSON object a line; may be growing."),
    profile: list[Path] = typer.Option(
        [], help="What trimtab profile vllm wrote; repeatable, one for each engine."
    ),
    out: Path = typer.Option(
        Path("urgency.yaml"), help="Where the options are written that hosts and routers load."
    ),
    every: str | None = typer.Option(
        None, help="Tune again this often, e.g. 100s, from the last part of the trace."
    ),
    last: str = typer.Option("10m", help="With --every: the part of the trace that counts."),
    rounds: int | None = typer.Option(None, min=1, help="With --every: end after so many."),
    budget: str = typer.Option("60s", help="The longest search; with less time nothing changes."),
    seed: int = typer.Option(0, min=0, help="Seed of the windows that are drawn from the trace."),
    json_: bool = typer.Option(False, "--json", help="Print one JSON object for each search."),
) -> None:
    """Find the options that meet the most deadlines, by replaying a trace on the simulator."""
    import os
    import time

    from trimtab.urgency import tuned
    from trimtab.urgency.config import TunedOptions

    period_s = None if every is None else seconds(every, "--every")
    last_s = float("inf") if period_s is None else seconds(last, "--last")
    budget_s = seconds(budget, "--budget")
    profiles = _profiles(profile)
    current = tuned.read(out) if out.exists() else TunedOptions()
    if period_s is not None:
        os.nice(_NICE)
    done = 0
    while True:
        started_s = time.monotonic()
        found = _search(trace, last_s, profiles, current, seed + done, budget_s)
        if found is not None:
            if found.changed or not out.exists():
                tuned.write(out, found.options, "Written by trimtab tune urgency.")
            current = found.options
            _say(found, json_)
        done += 1
        if period_s is None or done == rounds:
            return
        time.sleep(max(0.0, started_s + period_s - time.monotonic()))


def seconds(text: str, option: str) -> float:
    """A time such as ``100s``, ``10m`` or ``1h`` in seconds.

    Raises:
        BadInput: the text is no such time above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip())
    if found is None or found[2] not in _UNITS or not float(found[1]) > 0:
        raise BadInput(
            f"{text!r} is no time above 0", where=option, fix="give one such as 100s, 10m or 1h"
        )
    return float(found[1]) * _UNITS[found[2]]


def _profiles(paths: list[Path]) -> list[EngineProfile]:
    from trimtab.core.cost.step import EngineProfile
    from trimtab.urgency.paper.hardware import A100

    if paths:
        return [EngineProfile.read(path) for path in paths]
    usual = A100.replica().profile
    typer.echo(
        f"no --profile: tuned for {usual.model} on an {usual.device}; "
        "trimtab profile vllm measures your engine",
        err=True,
    )
    return [usual]


def _search(
    trace: Path,
    last_s: float,
    profiles: list[EngineProfile],
    current: TunedOptions,
    seed: int,
    budget_s: float,
) -> Tuning | None:
    """One search; None where the trace has too little to learn from yet."""
    from trimtab.urgency import tuning
    from trimtab.urgency.config import UrgencyConfig

    requests = tuning.recent(trace, last_s)
    if not requests:
        typer.echo(f"{trace} has no whole workflow yet", err=True)
        return None
    fields = [tuning.queue_candidates()]
    if len(profiles) > 1:
        fields = [tuning.alpha_candidates(), tuning.dispatch_candidates(), *fields]
    replays = tuning.Replays(
        requests, profiles, UrgencyConfig.model_validate({}), seed=seed, budget_s=budget_s
    )
    return tuning.tune(replays, current, fields)


def _say(found: Tuning, as_json: bool) -> None:
    from trimtab.urgency.tuning import summary

    if as_json:
        typer.echo(summary(found))
    elif not found.in_time:
        typer.echo("the search did not end within its budget: nothing changes")
    else:
        verb = "changed" if found.changed else "kept"
        typer.echo(
            f"{verb}: loss {found.before:.4f} before, {found.after:.4f} for the best of "
            f"{found.simulations} simulations"
        )
