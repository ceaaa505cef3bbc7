"""``trimtab route`` and ``trimtab up``: what they refuse, and that a signal ends them in order."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from trimtab.core.benchmark import Options
from trimtab.core.errors import BadInput
from trimtab.urgency import route_command
from trimtab.urgency.plugin import trimtab_commands
from trimtab.urgency.router import bench


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


def address(process: subprocess.Popen[str]) -> str:
    """Where a router listens, as it says."""
    assert process.stderr is not None
    said = ""
    while not (found := re.search(r"http://127\.0\.0\.1:\d+(?=;)", said)):
        line = process.stderr.readline()
        assert line, said
        said += line
    return found[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_router_serves_until_a_signal_ends_it(number: signal.Signals) -> None:
    arguments = ("route", "--port", "0", "--backend", "http://127.0.0.1:9")
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab.cli", *arguments], stderr=subprocess.PIPE, text=True
    )
    url = address(process)
    with urllib.request.urlopen(f"{url}/trimtab/state", timeout=60) as answer:
        assert b'"state":"down"' in answer.read()
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode in (0, 128 + number, -number)


UP = """
import sys
from trimtab.hosts.vllm.server import Server

module = "trimtab.urgency.router.stub"
Server.command = lambda self: [sys.executable, "-m", module, str(self.port)]
sys.argv = ["trimtab", "up", "urgency.yaml", "--port", "0", *sys.argv[1:]]
from trimtab.cli.command_line import main
raise SystemExit(main())
"""
"""``trimtab up`` with stubs for vLLM's servers."""


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    file(tmp_path, "servers: [{model: ./model, name: a}, {model: ./model, name: b}]")
    process = subprocess.Popen(
        [sys.executable, "-c", UP, "--logs", "."],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, address(process)
    finally:
        process.terminate()
        process.communicate(timeout=120)


def stubs_in(folder: Path) -> list[int]:
    """The living processes that work in a folder and are stubs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            stub = "-m\0trimtab.urgency.router.stub" in (process / "cmdline").read_text()
            if stub and (process / "cwd").readlink() == folder:
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_up_starts_the_servers_and_ends_them_on_a_signal(
    running: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    process, url = running
    request = urllib.request.Request(f"{url}/v1/chat/completions", b"{}")
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert b"choices" in answer.read()
    assert len(stubs_in(tmp_path)) == 2
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert stubs_in(tmp_path) == []


def test_up_goes_on_with_the_servers_that_live_and_ends_with_the_last(
    running: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    process, _ = running
    assert process.stderr is not None
    first, second = stubs_in(tmp_path)
    os.kill(first, signal.SIGKILL)
    while "the others go on" not in (line := process.stderr.readline()):
        assert line
    os.kill(second, signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the vLLM server ended with status -9" in said


def test_the_benchmark_compares_direct_with_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK_ROUND_S", 0.1)
    said = []
    cases = bench.router_cases(Options(quick=True), lambda message, done=None: said.append(message))
    metrics = ["first_byte_p50_s", "first_byte_p99_s", "latency_p50_s", "latency_p99_s"]
    assert [case.metric for case in cases] == metrics
    assert all(case.baseline == "direct" and case.value > 0 for case in cases)
    assert len(said) == bench.QUICK_ROUNDS


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
