"""``trimtab demo`` on real servers: what it reports, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimtab.hosts.vllm.small_model import small_model

PATIENCE_S = 1200

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE_S)]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "trimtab.cli", "demo", *arguments]


def alive(folder: Path) -> dict[int, str]:
    """The living processes that work in a folder, as the demo's do, with their command lines."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def is_gone(folder: Path, within_s: float = 120.0) -> bool:
    """Whether no process is left in a folder, at the latest after so many seconds."""
    until_s = time.monotonic() + within_s
    while alive(folder):
        if time.monotonic() > until_s:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(scope="module", autouse=True)
def model() -> None:
    """The small model is made before any clock runs."""
    small_model()


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def start(folder: Path) -> subprocess.Popen[str]:
    """A demo that works in a folder and keeps its logs there."""
    return subprocess.Popen(
        command(),
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder)},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_server(folder: Path, demo: subprocess.Popen[str]) -> None:
    """Returns once an engine of the demo has started."""
    until_s = time.monotonic() + PATIENCE_S
    while not any("EngineCore" in line for line in alive(folder).values()):
        assert demo.poll() is None, demo.stderr and demo.stderr.read()
        assert time.monotonic() < until_s
        time.sleep(0.2)


def test_the_demo_compares_both_orders_and_leaves_no_process(tmp_path):
    done = subprocess.run(
        command("--workflows", "6", "--json", "--out", str(tmp_path / "figures.json")),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "figures.json").read_text())
    assert alive(tmp_path) == {}
    for side in ("baseline", "ours"):
        figures = report[side]["figures"]
        assert figures["workflows"] == 6
        assert figures["mean_latency_s"] > 0
        assert figures["calls"] >= 6 * 3
        assert figures["output_tokens"] > 0
    assert report["baseline"]["vllm_arguments"] == []
    assert "trimtab.hosts.vllm.Scheduler" in report["ours"]["vllm_arguments"]
    assert len(report["workflows"]) == 6
    assert all(w["baseline_latency_s"] > 0 and w["latency_s"] > 0 for w in report["workflows"])
    assert set(report["ratios"]) >= {"workflows_within_deadline", "mean_latency_s"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_server_behind(tmp_path, number):
    demo = start(tmp_path)
    try:
        wait_for_server(tmp_path, demo)
        demo.send_signal(number)
        expected = -number if number == signal.SIGKILL else 128 + number
        assert demo.wait(240) == expected
        assert is_gone(tmp_path)
        assert not (tmp_path / "trimtab-demo.json").exists()
    finally:
        demo.kill()
        demo.communicate()


def test_a_server_that_is_killed_ends_the_demo_with_its_log(tmp_path):
    demo = start(tmp_path)
    try:
        wait_for_server(tmp_path, demo)
        server = next(
            number for number, line in alive(tmp_path).items() if "openai.api_server" in line
        )
        os.kill(server, signal.SIGKILL)
        _, said = demo.communicate(timeout=600)
    finally:
        demo.kill()
    assert demo.returncode == 1
    (sentence,) = [line for line in said.splitlines() if line.startswith("trimtab:")]
    assert "the vLLM server ended with status -9" in sentence
    log = Path(sentence.rpartition("the whole log: ")[2].rstrip(").").strip())
    assert log.is_file()
    assert is_gone(tmp_path)


@pytest.mark.parametrize("second", [False, True])
def test_a_taken_port_is_said_in_one_sentence(tmp_path, taken_port, second):
    port = taken_port - 1 if second else taken_port
    done = refused(tmp_path, "--port", str(port))
    assert f"port {taken_port} is taken by another process" in done.stderr


def test_a_model_that_is_not_there_is_said_in_one_sentence(tmp_path):
    done = refused(tmp_path, "--model", "./absent")
    assert "there is no such folder" in done.stderr
    (tmp_path / "empty").mkdir()
    done = refused(tmp_path, "--model", "./empty")
    assert "the folder holds no config.json" in done.stderr
    done = refused(tmp_path, "--model", "nobody/no-such-model")
    assert "'nobody/no-such-model': the model is not on this machine" in done.stderr


def test_an_output_that_cannot_be_written_is_said_before_the_run(tmp_path):
    done = refused(tmp_path, "--out", "absent/figures.json")
    assert "there is no such folder" in done.stderr


def refused(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A demo that ends with status 2, one sentence and no process."""
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("trimtab:")] == [
        done.stderr.splitlines()[-1]
    ]
    assert done.stdout == ""
    assert is_gone(folder)
    return done
