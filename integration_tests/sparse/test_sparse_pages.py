"""The snippets of the pages on sparse attention run as they are written.

A page's blocks run in its order and share their names. A model and a tokenizer are given.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^ *```py\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 200, "num_hidden_layers": 2}


class Tokenizer:
    """What a snippet does with one."""

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


def snippets(page):
    return BLOCK.findall((ROOT / page).read_text())


@pytest.mark.parametrize(
    ("page", "count"),
    [("kernels/README.md", 1), ("plugins/sparse/README.md", 3), ("docs/sparse.md", 6)],
)
def test_the_snippets_of_a_page_run(page, count, tmp_path, monkeypatch):
    """But for those that start DeepSpeed, whose jobs `native_rank` runs."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2))
    names = {"model": model.eval(), "tokenizer": Tokenizer()}
    found = [code for code in snippets(page) if "deepspeed.initialize" not in code]
    assert len(found) >= count
    for code in found:
        exec(compile(code, page, "exec"), names)
    assert page != "kernels/README.md" or names["out"].isfinite().all()
    assert page != "plugins/sparse/README.md" or (tmp_path / "my-model" / "config.json").exists()
