from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from trimtab.cli.command_line import run
from trimtab.core.errors import BadInput, Infeasible, TrimtabError, Unsupported

PLUGIN = """
    import os, signal, time
    from typing import Literal
    import typer
    from pydantic import BaseModel, Field
    from trimtab.core.errors import Infeasible
    from trimtab.core.hooks import PluginInfo, hookimpl
    from trimtab.core.policy import CallField

    class Inner(BaseModel):
        depth: int = Field(3, description="how deep")

    class Options(BaseModel):
        order: Literal["a", "b"] = Field("a", description="which order")
        share: float = Field(description="what share")
        inner: Inner = Inner()

    @hookimpl
    def trimtab_info():
        return PluginInfo(
            "steers a thing", "--thing", Options,
            {"mood": CallField(str, "how it feels", header="X-Mood")},
        )

    @hookimpl
    def trimtab_commands(app):
        @app.command()
        def thing(what: str):
            print("thing!", flush=True)
            if what == "infeasible":
                raise Infeasible("too small", relaxation="buy more")
            if what == "fault":
                raise KeyError("lost")
            if what == "wait":
                time.sleep(60)
            if what == "flood":
                for _ in range(100_000):
                    print("x" * 80)
"""
GROUP = "trimtab.plugins"


@pytest.fixture
def plugin(site):
    site.add(
        "trimtab-thing", "3.1", {GROUP: {"thing": "thing_plugin"}}, {"thing_plugin.py": PLUGIN}
    )
    return site


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BadInput("x is -1", where="a.yaml:3", fix="give a positive number"), 2),
        (Unsupported("vllm 9 is too new"), 2),
        (Infeasible("4 GPUs do not fit", relaxation="give 5"), 3),
        (TrimtabError("we lost a file"), 1),
    ],
)
def test_an_error_of_ours_is_one_sentence_and_its_status(error, status, capsys):
    assert run(raising(error)) == status
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"trimtab: {error}\n")


def test_an_unexpected_error_is_one_sentence_that_says_how_to_see_more(capsys):
    assert run(raising(ValueError("first line\nsecond line"))) == 1
    err = capsys.readouterr().err
    assert err == "trimtab: ValueError: first line; run with TRIMTAB_DEBUG=1 for the traceback.\n"


def test_the_debug_variable_adds_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("TRIMTAB_DEBUG", "1")
    assert run(raising(ValueError("why"))) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 1),
        (SystemExit(7), 7),
        (SystemExit(None), 0),
    ],
)
def test_other_ends_are_quiet(end, status, capsys):
    assert run(raising(end)) == status
    assert capsys.readouterr() == ("", "")


def test_version(site):
    done = site.trimtab("--version")
    assert (done.returncode, done.stdout) == (0, f"trimtab {version('trimtab-core')}\n")


def test_a_usage_error_exits_with_2(site):
    assert site.trimtab("nonsense").returncode == 2
    assert site.trimtab("plugins", "--nonsense").returncode == 2


def test_a_plugin_adds_commands_and_its_errors_have_their_statuses(plugin):
    done = plugin.trimtab("thing", "well")
    assert (done.returncode, done.stdout, done.stderr) == (0, "thing!\n", "")
    done = plugin.trimtab("thing", "infeasible")
    assert (done.returncode, done.stderr) == (3, "trimtab: infeasible: too small; buy more.\n")
    done = plugin.trimtab("thing", "fault")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_a_broken_plugin_breaks_no_command(plugin):
    plugin.add("trimtab-bad", "1", {GROUP: {"bad": "bad_plugin"}}, {"bad_plugin.py": "1 / 0"})
    worse = """
        from trimtab.core.hooks import hookimpl
        @hookimpl
        def trimtab_commands(app):
            raise OSError("no")
    """
    plugin.add("trimtab-worse", "1", {GROUP: {"worse": "worse"}}, {"worse.py": worse})
    done = plugin.trimtab("thing", "well")
    assert (done.returncode, done.stdout) == (0, "thing!\n")
    assert done.stderr == "trimtab: the plugin 'worse' adds no commands (OSError: no).\n"


@pytest.mark.parametrize("arguments", [["--version"], ["bench", "--help"], ["doctor", "--help"]])
def test_the_core_s_own_commands_import_no_plugin(site, arguments):
    site.add(
        "trimtab-slow", "1", {GROUP: {"slow": "slow"}}, {"slow.py": "open('imported', 'w').close()"}
    )
    assert site.trimtab(*arguments).returncode == 0
    assert not (site.root / "imported").exists()
    site.trimtab("--help")
    assert (site.root / "imported").exists()


def test_the_command_line_imports_nothing_heavy():
    code = """
import sys
from trimtab.cli.command_line import command_line
command_line(["--version"])
print(*{name.partition(".")[0] for name in sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"deepspeed", "highspy", "networkx", "numpy", "pulp", "scipy", "torch", "vllm", "rich"}
    assert not heavy & set(done.stdout.split())


def test_completion_knows_the_commands_of_the_core_and_of_plugins(plugin):
    done = plugin.trimtab(_TRIMTAB_COMPLETE="complete_bash", COMP_WORDS="trimtab ", COMP_CWORD="1")
    assert {"bench", "doctor", "plugins", "thing"} <= set(done.stdout.split())


def test_ctrl_c_ends_a_command_with_130_and_no_traceback(plugin):
    command = [sys.executable, "-m", "trimtab.cli", "thing", "wait"]
    with subprocess.Popen(
        command,
        env=plugin.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "thing!\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


@pytest.mark.parametrize("what", ["flood", "well"])
def test_a_reader_that_goes_away_is_no_error_worth_a_word(plugin, what):
    reader, writer = os.pipe()
    os.close(reader)
    done = plugin.trimtab("thing", what, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_closed_stdout_is_no_error(plugin):
    command = [sys.executable, "-m", "trimtab.cli", "thing", "well"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command],
        stderr=subprocess.PIPE,
        text=True,
        env=plugin.environment(),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_said(site):
    with open("/dev/full", "w") as full:
        done = site.trimtab("--version", stdout=full.fileno())
    assert (done.returncode, done.stderr) == (2, "trimtab: the disk is full; free some space.\n")


def test_plugins_lists_options_hooks_and_fields_and_the_broken(plugin):
    plugin.add("trimtab-bad", "0.2", {GROUP: {"bad": "bad_plugin"}}, {"bad_plugin.py": "1 / 0"})
    plugin.add("trimtab-mute", "0.3", {GROUP: {"mute": "mute"}}, {"mute.py": ""})
    done = plugin.trimtab("plugins", "--json")
    listing = json.loads(done.stdout)
    (thing,) = [p for p in listing["plugins"] if p["name"] == "thing"]
    assert thing == {
        "name": "thing",
        "distribution": "trimtab-thing",
        "version": "3.1",
        "summary": "steers a thing",
        "enable": "--thing",
        "hooks": ["trimtab_commands", "trimtab_info"],
        "options": [
            {
                "key": "order",
                "type": "Literal['a', 'b']",
                "required": False,
                "default": "a",
                "description": "which order",
            },
            {
                "key": "share",
                "type": "float",
                "required": True,
                "default": None,
                "description": "what share",
            },
            {
                "key": "inner.depth",
                "type": "int",
                "required": False,
                "default": 3,
                "description": "how deep",
            },
        ],
        "call_fields": [
            {
                "key": "trimtab.mood",
                "type": "str",
                "header": "X-Mood",
                "description": "how it feels",
            }
        ],
    }
    reasons = {p["name"]: (p["version"], p["reason"]) for p in listing["broken"]}
    assert reasons["bad"] == ("0.2", "ZeroDivisionError: division by zero")
    assert reasons["mute"] == ("0.3", "it does not implement trimtab_info")


def test_the_table_of_plugins_says_the_same(plugin):
    plugin.add("trimtab-bad", "0.2", {GROUP: {"bad": "bad_plugin"}}, {"bad_plugin.py": "1 / 0"})
    text = plugin.trimtab("plugins").stdout
    for piece in (
        "thing  steers a thing  (trimtab-thing 3.1)",
        "--thing",
        "inner.depth",
        "which order",
        "required",
        "trimtab.mood",
        "X-Mood",
        "bad  broken  (trimtab-bad 0.2)",
        "ZeroDivisionError",
    ):
        assert piece in text


def test_emit_prints_the_files_of_a_plan_or_writes_them(site):
    from trimtab.core.plan import Objective, Plan, Slot

    objective = Objective(metric="rate", unit="req/s", better="higher", value=9.0, bound=10.0)
    ranks = tuple(Slot(node=node, device=0) for node in ("n2", "n1"))
    Plan(planner="placement", objective=objective, ranks=ranks).write(site.root / "plan.json")
    files = json.loads(site.trimtab("emit", "plan.json", "--to", "deepspeed", "--json").stdout)
    assert any(text.index("n2") < text.index("n1") for text in files.values() if "n1" in text)
    printed = site.trimtab("emit", "plan.json", "--to", "deepspeed").stdout
    assert all(name in printed and text in printed for name, text in files.items())
    done = site.trimtab("emit", "plan.json", "--to", "deepspeed", "--out", "job")
    assert done.returncode == 0
    assert {path.name: path.read_text() for path in (site.root / "job").iterdir()} == files
    done = site.trimtab("emit", "plan.json", "--to", "abacus")
    assert (done.returncode, done.stdout) == (2, "")
    assert "abacus" in done.stderr
