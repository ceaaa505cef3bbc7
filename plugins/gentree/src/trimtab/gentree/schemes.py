"""The basic plan types: ways in which a number of parties below one switch become one."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trimtab.core.collectives import Layout, Step
from trimtab.core.collectives.combine import exchange, folded, ring, staged
from trimtab.core.cost import GenModel, hierarchical_ps

Built = tuple[list[Step], Layout]


AWKWARD = 3
"""Numbers with no more factorisations, such as primes, also get groups of unequal size."""

SMALL_BYTES = 64 * 1024
"""Up to here a reduction at one rank and a broadcast may be worth trying."""

LEAST_ROUND = 0.01
"""From so large a share of a payload's time on a link a round is worth saving."""

WHOLE_ONE_SHOTS = 3
"""So many plans of one-shot stages alone are tried at each switch."""

SLOW = 1.5
"""A party whose link is so much slower than the middle one may fold into another."""


@dataclass(frozen=True)
class Scheme:
    """A basic plan type for some parties.

    Attributes:
        name: as it stands in a plan, e.g. ``8x3`` or ``ring``.
        build: from the parties' layouts to the steps, and the layout behind them.
    """

    name: str
    build: Callable[[Sequence[Layout]], Built]


def schemes(
    count: int,
    payload_bytes: float,
    model: GenModel,
    betas: Sequence[float],
    most: int,
    *,
    equal: bool = False,
    one_shot: bool = False,
) -> list[Scheme]:
    """All basic plan types for so many parties.

    Args:
        count: how many parties there are, at least 2.
        payload_bytes: on each rank.
        model: of the parties' links, to sort out hopeless stages where there are many.
        betas: seconds for each byte of each party's link.
        most: of more staged plans, those that are best by GenModel's closed form for one switch.
        equal: only those in which all parties end with equal parts.
        one_shot: also those of which ranks end with all of the payload.
    """
    sizes = stage_sizes(count, payload_bytes, model, most, equal=equal)
    found = [_staged(factors) for factors in sizes]
    found.append(Scheme("ring", _ring))
    if equal:
        return found
    found += _folds(count, payload_bytes, model)
    found += _unequal(betas)
    if one_shot:
        found += one_shots(count, payload_bytes, model, sizes)
    if payload_bytes <= SMALL_BYTES:
        found.append(Scheme("reduce-broadcast", _rooted))
    return found


def stage_sizes(
    count: int, payload_bytes: float, model: GenModel, most: int, *, equal: bool = False
) -> list[tuple[int, ...]]:
    """Group sizes of staged direct exchange: all ordered factorisations, and uneven groups."""
    exact = list(factorisations(count))
    found = exact + (_uneven(count) if len(exact) <= AWKWARD and not equal else [])
    if len(found) <= most:
        return found
    ranked = sorted(found, key=lambda sizes: model.seconds(hierarchical_ps(sizes), payload_bytes))
    return list(dict.fromkeys([*ranked[:most], (count,)]))


def one_shots(
    parties: int, payload_bytes: float, model: GenModel, staged_sizes: Sequence[tuple[int, ...]]
) -> list[Scheme]:
    """Staged plans whose last stages are one-shot, for parties that end with all of the payload.

    They save rounds of the all-gather for more bytes, and so pay where rounds cost something.

    Args:
        parties: how many there are.
        payload_bytes: on each rank.
        model: of the parties' links.
        staged_sizes: group sizes of plans of which the last stage is tried.
    """
    round_s = model.alpha_s + 2 * model.message_s
    if round_s < LEAST_ROUND * model.beta_s_per_byte * payload_bytes:
        return []

    def alone_s(sizes: tuple[int, ...]) -> float:
        others = sum(size - 1 for size in sizes)
        each_s = 2 * model.message_s + model.beta_s_per_byte * payload_bytes
        return len(sizes) * model.alpha_s + others * each_s

    whole = heapq.nsmallest(WHOLE_ONE_SHOTS, factorisations(parties), key=alone_s)
    tails = [sizes for sizes in staged_sizes if len(sizes) > 1]
    return [
        *(_in_one_shots(sizes, len(sizes)) for sizes in whole),
        *(_in_one_shots(sizes, 1) for sizes in tails),
    ]


def _in_one_shots(sizes: tuple[int, ...], count: int) -> Scheme:
    return Scheme(
        one_shot_name("x".join(map(str, sizes)), count),
        lambda parties: staged(parties, sizes, count),
    )


def one_shot_name(stages: str, count: int) -> str:
    """The name of stages of which the last are one-shot, e.g. ``4x2, last 1 in one shot``."""
    return f"{stages}, last {count} in one shot"


def _uneven(count: int) -> list[tuple[int, ...]]:
    """Stages whose groups differ by one, as if some members more were there."""
    found = [(f, -(-count // f)) for f in range(2, min(count // 2, 32) + 1) if count % f]
    return found + ([(2,) * (count - 1).bit_length()] if count & (count - 1) else [])


def factorisations(count: int) -> Iterator[tuple[int, ...]]:
    """Every ordered way to write a number as a product of factors from 2."""
    if count > 1:
        yield (count,)
    for factor in range(2, count // 2 + 1):
        if count % factor == 0:
            for rest in factorisations(count // factor):
                yield (factor, *rest)


def _staged(factors: tuple[int, ...]) -> Scheme:
    name = "x".join(map(str, factors))
    return Scheme(name, lambda parties: staged(parties, factors))


def _ring(parties: Sequence[Layout]) -> Built:
    step, layout = ring(parties)
    return [step], layout


def _rooted(parties: Sequence[Layout]) -> Built:
    step, layout = exchange(parties, [1.0] + [0.0] * (len(parties) - 1))
    return [step], layout


def _folds(count: int, payload_bytes: float, model: GenModel) -> list[Scheme]:
    """One party folds in before the rest, or as many as leave a power of two."""
    found = []
    power = 1 << (count.bit_length() - 1)
    if count > 2 and power != count:
        extras = range(1, 2 * (count - power), 2)
        found.append(
            _folded(f"fold {count - power} + halving", extras, (2,) * (power.bit_length() - 1))
        )
    if count > 3 and len(list(factorisations(count))) == 1:
        best = stage_sizes(count - 1, payload_bytes, model, 1)[0]
        name = "x".join(map(str, best))
        found.append(_folded(f"fold 1 + {name}", [count - 1], best))
    return found


def _unequal(betas: Sequence[float]) -> list[Scheme]:
    """Where links are unequal: shares by their rates, or the slow ones fold into others."""
    if not betas or max(betas) <= min(betas) * (1 + 1e-9) or min(betas) <= 0:
        return []
    rates = [1 / beta for beta in betas]
    found = [Scheme("shares by rate", lambda parties: _weighted(parties, rates))]
    middle = sorted(betas)[len(betas) // 2]
    slow = [index for index, beta in enumerate(betas) if beta > SLOW * middle]
    left = len(betas) - len(slow)
    if 0 < len(slow) <= left:
        found.append(
            _folded(f"fold {len(slow)} slow + {left}", slow, (left,) if left > 1 else (1,))
        )
        if left > 2:
            found.append(_folded(f"fold {len(slow)} slow + ring", slow, ()))
    return found


def _weighted(parties: Sequence[Layout], rates: Sequence[float]) -> Built:
    step, layout = exchange(parties, rates)
    return [step], layout


def _folded(name: str, extras: Sequence[int], factors: tuple[int, ...]) -> Scheme:
    chosen = tuple(extras)
    return Scheme(name, lambda parties: folded(parties, chosen, factors))
