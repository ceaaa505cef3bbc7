"""``trimtab launch``: becomes a training launcher, with placement and collectives applied."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperCommand

from trimtab.core.errors import BadInput

if TYPE_CHECKING:
    from trimtab.hosts.launch import Launch


class LaunchCommand(TyperCommand):
    """A command whose last part, behind ``--``, is left exactly as it was typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the options before ``--``, and keeps the command behind it in ``ctx.obj``.

        Raises:
            BadInput: there is no ``--``, or nothing behind it.
        """
        end = args.index("--") if "--" in args else len(args)
        own, ctx.obj = args[:end], args[end + 1 :]
        if not (ctx.obj or ctx.resilient_parsing or set(own) & set(ctx.help_option_names)):
            raise BadInput(
                "there is no command to launch",
                fix="give it after --, as in: trimtab launch -- torchrun train.py",
            )
        return super().parse_args(ctx, own)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What follows the command's name in its usage line."""
        return [*super().collect_usage_pieces(ctx), "--", "LAUNCHER …"]


def launch(
    ctx: typer.Context,
    plan: Path | None = typer.Option(
        None, "--plan", metavar="PLAN", help="Give the hosts their ranks in this plan's order."
    ),
    config: Path | None = typer.Option(
        None,
        "--config",
        metavar="FILE",
        help="The JSON file with the trimtab block, where the job's arguments name none.",
    ),
) -> None:
    """Run a training launcher with placement and collectives applied.

    The launcher is deepspeed, torchrun, python -m torch.distributed.run or srun. The plugins are
    those in the "trimtab" block of the job's DeepSpeed configuration; without any, the launcher
    runs as it would alone.
    """
    from trimtab.hosts.launch import prepare

    command: list[str] = ctx.obj
    prepared = prepare(command, os.environ, plan, config)
    _tell(prepared, command)
    become(prepared.command, prepared.environment)


def become(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Turns this process into the command.

    Its streams, terminal, signals and exit status are then its own: nothing stands in between.

    Raises:
        BadInput: there is no such program, or it cannot be run.
    """
    program = shutil.which(command[0], path=environment.get("PATH", os.defpath))
    if program is None:
        raise BadInput(
            f"there is no program {command[0]!r}",
            fix="install it, activate its environment, or give its path",
        )
    sys.stdout.flush()
    sys.stderr.flush()
    _restore_signals()
    try:
        os.execve(program, list(command), dict(environment))
    except OSError as error:
        raise BadInput(
            f"{program} cannot be run ({error.strerror})", fix="give a program for this machine"
        ) from None


def _restore_signals() -> None:
    """Python ignores these from its start on, and programs inherit what is ignored."""
    for name in ("SIGPIPE", "SIGXFSZ"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)


def _tell(prepared: Launch, command: Sequence[str]) -> None:
    """Says on stderr what is run where it is not what was typed, and which hosts are left out."""
    if prepared.command != tuple(command):
        import shlex

        print(f"trimtab: launching {shlex.join(prepared.command)}", file=sys.stderr)
    if prepared.idle:
        from trimtab.hosts.host_order import listed

        print(f"trimtab: {listed(prepared.idle)} left without a rank.", file=sys.stderr)
