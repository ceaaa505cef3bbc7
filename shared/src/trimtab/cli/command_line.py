"""The command line as a whole: its commands, and what a failure prints and exits with."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from importlib.metadata import version

import typer

from trimtab.core.command_groups import SHARED
from trimtab.core.errors import TrimtabError

DEBUG_VARIABLE = "TRIMTAB_DEBUG"


def main() -> None:
    """Runs the ``trimtab`` command of this process and exits with its status."""
    if sys.stdout is None:  # the caller closed it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    status = run(lambda: command_line(sys.argv[1:])(prog_name="trimtab"))
    sys.exit(_end_output(status))


def run(command: Callable[[], object]) -> int:
    """Runs a command; its failure becomes one sentence on stderr.

    Returns:
        The exit status: 0 done, 2 bad input, 3 infeasible, 130 interrupted, 1 a fault of ours.
    """
    try:
        command()
    except SystemExit as end:
        return _status(end)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except TrimtabError as error:
        return _fail(str(error), error.exit_status)
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return _fail("the disk is full; free some space.", 2)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return _fail(f"{reason}; run with {DEBUG_VARIABLE}=1 for the traceback.", 1)
    return 0


def command_line(arguments: list[str]) -> typer.Typer:
    """The command line that can answer ``arguments``.

    The plugins are left alone where a command of the core is asked for, so that none of them can
    slow it down or break it.
    """
    app = typer.Typer(
        help="Steer vLLM, DeepSpeed and torch.distributed with small plugins.",
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_global_options)
    _add_core_commands(app)
    core = {command.name for command in app.registered_commands}
    core |= {group.name for group in app.registered_groups} - SHARED
    if not arguments or arguments[0] not in core | {"--version"}:
        _add_plugin_commands(app)
    return app


def _add_core_commands(app: typer.Typer) -> None:
    """Adds the core's own commands; their modules import what they need when they run."""
    from trimtab.cli import (
        bench,
        doctor,
        emit,
        import_topology,
        launch,
        plugins,
        profile_network,
        profile_vllm,
        simulate_serving,
    )
    from trimtab.core.command_groups import command_group

    app.command("bench")(bench.bench)
    app.command("doctor")(doctor.doctor)
    app.command("emit")(emit.emit)
    app.command("import")(import_topology.import_topology)
    app.command("launch", cls=launch.LaunchCommand)(launch.launch)
    app.command("plugins")(plugins.plugins)
    command_group(app, "profile").command("network")(profile_network.network)
    command_group(app, "profile").command("vllm")(profile_vllm.vllm)
    command_group(app, "simulate").command("serving")(simulate_serving.serving)


def _global_options(
    show_version: bool = typer.Option(
        False,
        "--version",
        is_eager=True,
        callback=lambda wanted: _print_version() if wanted else None,
        help="Print the version and exit.",
    ),
) -> None:
    pass


def _print_version() -> None:
    typer.echo(f"trimtab {version('trimtab-core')}")
    raise typer.Exit


def _add_plugin_commands(app: typer.Typer) -> None:
    from trimtab.core.hooks import discover

    for plugin in discover()[0]:
        try:
            plugin.manager.hook.trimtab_commands(app=app)
        except Exception as error:
            _say(f"the plugin {plugin.name!r} adds no commands ({type(error).__name__}: {error}).")


def _fail(sentence: str, status: int) -> int:
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        import traceback

        traceback.print_exc()
    _say(sentence)
    return status


def _say(sentence: str) -> None:
    print(f"trimtab: {sentence}", file=sys.stderr)


def _status(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    _say(str(end.code))
    return 1


def _end_output(status: int) -> int:
    """Ends stdout here: what frameworks print while the process goes down lands on stderr.

    Args:
        status: the exit status so far; what went wrong is said once.

    Returns:
        The exit status, now that the output is written or cannot be.
    """
    # click hides a broken pipe behind a wrapper of sys.stdout, whose flush then says nothing.
    out = sys.__stdout__ or sys.stdout
    try:
        out.flush()
    except OSError:
        status = status or run(out.flush) or 1
        lost = True
    else:
        lost = False
    os.dup2(os.open(os.devnull, os.O_WRONLY) if lost else 2, 1)
    return status
