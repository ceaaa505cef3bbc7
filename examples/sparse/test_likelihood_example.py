"""The example says what dense attention and each share give."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.hosts.vllm.small_model import small_model

pytestmark = pytest.mark.integration

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: MODEL, TEXT_FILE"),
        (["model", "none.txt"], "there is no file none.txt"),
    ],
)
def test_without_a_text_it_says_how_it_is_used(arguments, said, monkeypatch, capsys):
    example = str(HERE / "likelihood.py")
    monkeypatch.setattr(sys, "argv", [example, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(example, run_name="__main__")
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert "usage: likelihood.py [-h] MODEL TEXT_FILE" in printed
    assert said in printed


def test_it_prints_a_line_for_each_share(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((HERE / "likelihood.py").read_text())
    ran = subprocess.run(
        [sys.executable, HERE / "likelihood.py", small_model(), text],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # two threads spin where a core is busy
        capture_output=True,
        text=True,
        check=True,
    )
    lines = ran.stdout.splitlines()
    assert "dense attention" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == ["mass 0.9", "mass 0.97", "mass 0.99"]
    shares = [int(line.split(", ")[1].split("%")[0]) for line in lines[1:]]
    assert shares == sorted(shares)
