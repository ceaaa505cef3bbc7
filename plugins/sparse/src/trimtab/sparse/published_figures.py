"""What FSA's paper published of its speed (arXiv 2508.18224v3): measured times and read ratios.

All are for 64 query heads of dimension 128, for a batch of one sequence, in bfloat16 or float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

HEADS, HEAD_SIZE = 64, 128
SYSTEMS = ("fsa", "nsa", "dense")
"""Published FSA, vanilla NSA, and full attention by Triton, in the order of the tables."""


class Run(NamedTuple):
    """What was run: tokens, query heads of a KV head, tokens of a block, blocks of a query."""

    gpu: str
    tokens: int
    group: int
    block: int
    top: int


class Times(NamedTuple):
    """Seconds of one system: the forward pass, and forward and backward together."""

    forward: float
    both: float


_K = 1024


def _table(gpu: str, text: str) -> dict[tuple[Run, str], Times]:
    """Lines of ``group, thousands of tokens, forward by system, both by system``."""
    found = {}
    for line in text.strip().splitlines():
        group, thousands, *seconds = line.split()
        run = Run(gpu, int(thousands) * _K, int(group), 64, 16)
        for at, system in enumerate(SYSTEMS):
            found[run, system] = Times(float(seconds[at]), float(seconds[at + 3]))
    return found


TIMES: Mapping[tuple[Run, str], Times] = {
    **_table(
        "h20",
        """
        1 128 1.42 2.08 2.64 2.36 4.51 12.08
        1 256 6.40 7.18 10.5 8.70 13.29 48.2
        2 128 .87 1.17 2.62 1.79 2.71 12.0
        2 256 3.74 4.07 10.5 6.03 8.43 48.3
        4 128 .52 .61 2.65 1.43 1.75 12.1
        4 256 2.41 2.44 10.5 4.66 5.98 48.2
        8 128 .45 .45 2.61 1.38 1.39 12.1
        8 256 1.63 1.64 10.5 3.99 4.75 48.3
        """,
    ),
    **_table(
        "h200",
        """
        1 128 .78 1.01 1.01 1.12 2.17 4.70
        1 256 3.92 3.97 3.96 4.81 6.99 18.75
        2 128 .46 .57 .98 .80 1.24 4.68
        2 256 2.14 2.17 3.98 3.04 4.12 18.77
        4 128 .27 .33 .99 .60 .82 4.71
        4 256 1.20 1.29 3.99 2.15 2.70 18.76
        8 128 .18 .18 .97 .50 .52 4.67
        8 256 .73 .73 3.97 1.72 2.01 18.78
        """,
    ),
}
"""Tables 6 and 7, blocks of 64 tokens."""


class Ratios(NamedTuple):
    """How many times as fast as each rival published FSA is, forward and backward together."""

    over_nsa: float
    over_dense: float


def _figure(gpu: str, block: int, top: int, text: str) -> dict[Run, Ratios]:
    """Lines of groups 1, 2, 4, 8; pairs of 8K, 16K, 32K, 64K tokens."""
    found = {}
    for group, line in zip((1, 2, 4, 8), text.strip().splitlines(), strict=True):
        values = [float(x) for x in line.split()]
        for at, thousands in enumerate((8, 16, 32, 64)):
            run = Run(gpu, thousands * _K, group, block, top)
            found[run] = Ratios(*values[2 * at : 2 * at + 2])
    return found


RATIOS: Mapping[Run, Ratios] = {
    **_figure(
        "h20",
        64,
        16,
        """
        1.7 0.4 2.3 1.1 2.6 2.2 2.3 3.6
        1.2 0.5 1.6 1.2 1.7 2.5 1.7 4.6
        1.0 0.7 1.2 1.6 1.3 3.3 1.3 5.5
        1.0 1.1 1.0 2.1 1.0 3.8 1.0 6.1
        """,
    ),
    **_figure(
        "h20",
        128,
        8,
        """
        2.4 0.5 3.0 1.1 3.5 2.4 3.0 3.8
        1.5 0.5 2.1 1.3 2.2 2.6 2.2 4.9
        1.1 0.6 1.5 1.7 1.7 3.4 1.6 5.8
        1.0 0.9 1.0 1.9 1.1 3.6 1.2 6.4
        """,
    ),
    **_figure(
        "h200",
        64,
        16,
        """
        1.2 0.2 2.6 0.8 2.4 1.4 2.1 2.4
        1.0 0.3 1.3 0.9 1.6 2.0 1.6 3.5
        1.0 0.6 1.0 1.8 1.2 2.5 1.2 4.3
        1.0 0.9 1.0 1.7 1.0 3.2 1.0 5.1
        """,
    ),
    **_figure(
        "h200",
        128,
        8,
        """
        1.5 0.2 1.1 0.6 2.9 1.5 2.6 2.7
        1.2 0.3 1.7 0.9 2.3 2.3 2.1 3.8
        1.0 0.5 1.2 1.0 1.6 2.7 1.5 4.6
        1.0 0.7 1.0 1.4 1.1 2.9 1.1 4.9
        """,
    ),
}
"""Figure 4, read off the picture: 0.1 either way."""
