"""How much likelihood sparse prefill costs on your own text: python likelihood.py MODEL TEXT_FILE.

The last half of the text counts. The share of blocks is that of all which attention could see.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.sparse import SparseConfig
from trimtab.sparse.in_transformers import register

MOST_TOKENS = 4096


@torch.no_grad()
def likelihood(model, ids, implementation):
    """The mean negative log-likelihood of the last half, in nats."""
    model.set_attn_implementation(implementation)
    logits = model(ids, use_cache=False).logits[0, ids.shape[1] // 2 : -1].float()
    return float(cross_entropy(logits, ids[0, ids.shape[1] // 2 + 1 :]))


def main(name, text):
    """Prints a line for dense attention and one for each share of attention kept."""
    ids = AutoTokenizer.from_pretrained(name)(text, return_tensors="pt").input_ids[:, :MOST_TOKENS]
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval()
    dense = likelihood(model, ids, "sdpa")
    print(f"{ids.shape[1]} tokens, dense attention: {dense:.4f} nat")
    for mass in (0.9, 0.97, 0.99):
        kept = []
        ours = likelihood(model, ids, register(SparseConfig(mass=mass, min_prompt=64), kept.append))
        print(f"mass {mass:g}: {ours - dense:+.4f} nat, {mean(kept):.0%} of the blocks")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a folder or name that transformers reads")
    parser.add_argument("text", metavar="TEXT_FILE", type=Path, help="some pages of UTF-8 text")
    arguments = parser.parse_args()
    if not arguments.text.is_file():
        parser.error(f"there is no file {arguments.text}")
    main(arguments.model, arguments.text.read_text(encoding="utf-8"))
