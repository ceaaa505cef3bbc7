"""``trimtab route`` and ``trimtab up``: what they refuse, and that a signal ends them in order."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from trimtab.core.errors import BadInput
from trimtab.urgency import route_command
from trimtab.urgency.plugin import trimtab_commands


def invoke(*arguments: str) -> BaseException | None:
    app = typer.Typer()
    trimtab_commands(app)
    return CliRunner().invoke(app, list(arguments)).exception


def file(folder: Path, text: str) -> str:
    path = folder / "urgency.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        ("route", "port: 0", "no server is given"),
        ("route", "servers: [{model: m, name: a}]", "trimtab up"),
        ("route", "backends: [{url: here}]", "'here' is no address"),
        ("route", "backends: [{url: 'http://a:1'}]\nquued: 3", "unknown key"),
        ("up", "backends: [{url: 'http://a:1'}]", "names no servers"),
        ("up", "servers: [{model: m}]", "name is missing"),
        ("up", "servers: [{model: ./none, name: a}]", "no such folder"),
        ("up", "servers: [{model: m, name: a}, {model: m, name: a}]", "'a' is given twice"),
    ],
)
def test_a_wrong_file_is_refused(command: str, text: str, said: str, tmp_path: Path) -> None:
    path = file(tmp_path, text)
    error = invoke(command, *(["--config"] if command == "route" else []), path)
    assert isinstance(error, BadInput)
    assert said in str(error)


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_command, "find_spec", lambda name: None)
    error = invoke("route", "--backend", "http://127.0.0.1:1")
    assert isinstance(error, BadInput)
    assert "trimtab-urgency[router]" in str(error)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_router_serves_until_a_signal_ends_it(number: signal.Signals) -> None:
    arguments = ("route", "--port", "0", "--backend", "http://127.0.0.1:9")
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab.cli", *arguments], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = ""
    while not (found := re.search(r"http://127\.0\.0\.1:\d+(?=;)", said)):
        line = process.stderr.readline()
        assert line, said
        said += line
    with urllib.request.urlopen(f"{found[0]}/trimtab/state", timeout=10) as answer:
        assert b'"state":"down"' in answer.read()
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode in (0, 128 + number, -number)


def test_the_batchs_size_is_read_from_vllms_own_flag(tmp_path: Path) -> None:
    from trimtab.core.documents import read_yaml
    from trimtab.hosts.vllm.server import Server
    from trimtab.urgency.router.config import RouterConfig

    text = """
    servers:
      - {model: m, name: a, arguments: [--max-num-seqs, 6]}
      - {model: m, name: b, arguments: [--max-num-seqs=7, --enforce-eager]}
      - {model: m, name: c, arguments: [--max-num-seqs, "8"], seats: 9, environment: {N: 1}}
      - {model: m, name: d, arguments: [--max-num-seqs]}
    """
    options = read_yaml(file(tmp_path, text), RouterConfig).servers
    assert options[2].environment == {"N": "1"}
    server = Server("m", tmp_path / "log", port=8001)
    backends = [route_command.backend_of(server, one) for one in options]
    assert [backend.seats for backend in backends] == [6, 7, 9, None]
    assert backends[0].url == "http://127.0.0.1:8001"
