"""The plugin that CONTRIBUTING.md shows, installed and driven as a user's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

DRIVE = """
import json
from trimtab.core.hooks import plugin
from trimtab.core.policy import Call
from trimtab.core.policy_stack import PolicyStack

stack = PolicyStack([("shortest", plugin("shortest").serving_policy({"tokens_per_s": 100}))])
arrivals = [(0, 900), (1, 50), (2, 60), (9, 5)]
calls = [Call(f"{tokens}@{at}", at, tokens, 16) for at, tokens in arrivals]
for call in calls:
    stack.on_arrival(call, call.arrival_s)
print(json.dumps([call.call_id for call in sorted(calls, key=lambda call: stack.key(call, 9.0))]))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables under which the plugin is installed."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", str(site), str(HERE)]
    subprocess.run(command, check=True)
    return {**os.environ, "PYTHONPATH": str(site)}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_trimtab_lists_the_plugin_with_its_option(environment: dict[str, str]) -> None:
    listed = run(environment, "-m", "trimtab.cli", "plugins", "--json")
    assert listed.returncode == 0, listed.stderr
    (found,) = [p for p in json.loads(listed.stdout)["plugins"] if p["name"] == "shortest"]
    assert [option["key"] for option in found["options"]] == ["tokens_per_s"]


def test_short_prompts_pass_long_ones_that_wait_less_than_their_patience(
    environment: dict[str, str],
) -> None:
    driven = run(environment, "-c", DRIVE)
    assert driven.returncode == 0, driven.stderr
    assert json.loads(driven.stdout) == ["50@1", "60@2", "900@0", "5@9"]


def test_a_wrong_option_is_named(environment: dict[str, str]) -> None:
    code = "from trimtab.core.hooks import plugin; plugin('shortest').configure({'tokens': 1})"
    refused = run(environment, "-c", code)
    assert "trimtab.shortest" in refused.stderr
    assert "tokens_per_s" in refused.stderr


def test_contributing_shows_the_plugin_as_it_is() -> None:
    guide = (HERE.parent.parent / "CONTRIBUTING.md").read_text()
    for name in ("shortest_first.py", "pyproject.toml"):
        assert (HERE / name).read_text() in guide
