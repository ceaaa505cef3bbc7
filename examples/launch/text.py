"""A tiny model that guesses the next character, and the text that each rank trains it on."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

CONTEXT = 8
BATCH = 32


def model() -> nn.Module:
    """The model; the same weights on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(128, 16),
        nn.Flatten(),
        nn.Linear(16 * CONTEXT, 64),
        nn.Tanh(),
        nn.Linear(64, 128),
    )


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Contexts (BATCH, CONTEXT) and the characters (BATCH,) that follow them in Python's manual."""
    text = torch.tensor([min(ord(letter), 127) for letter in topics["class"]])
    dice = torch.Generator().manual_seed(1000 * step + rank)
    starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=dice)
    window = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return window[:, :-1], window[:, -1]
