"""What no AllReduce on a tree can beat: the messages that must cross links, rounds and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trimtab.core.collectives.network_tree import NetworkTree
from trimtab.core.cost.plan_cost import Constants, memory_s_per_byte


def cut_bound_s_per_byte(tree: NetworkTree) -> float:
    """The least time of an AllReduce for each byte of the payload on each rank.

    Let the network be cut into K parts below different links, which hold all ranks together. An
    element must cross into a part at least K - 1 times to be summed and K - 1 times to be known to
    all. So in a time T the links into the parts, which carry T / β each, carry at least 2·(K - 1)
    payloads, however the network is cut. The worst cut is found from the leaves up, the least T by
    bisection. No switch is taken to add up or to copy messages.
    """
    if tree.size < 2:
        return 0.0
    betas = np.maximum(tree.up_s_per_byte, tree.down_s_per_byte).tolist()
    # Either side of a link has to send and to receive the whole payload once.
    within = [last - first < tree.size for first, last in tree.spans]
    low = max((beta for beta, inside in zip(betas, within, strict=True) if inside), default=0.0)
    high = max(2.0 * tree.size * max(betas), low)
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if _is_contradiction(tree, betas, middle):
            low = middle
        else:
            high = middle
    return low


def _is_contradiction(tree: NetworkTree, betas: Sequence[float], time_s: float) -> bool:
    """Whether some choice of parts shows that this time is too short for a payload of one byte."""
    owed = [0.0] * len(betas)  # by the parts below each point: two payloads less what they can
    parents, children = tree.parents, tree.children
    for point in range(len(betas) - 1, 0, -1):
        beta = betas[point]
        own = 2 - time_s / beta if beta > 0 else float("-inf")
        if own > owed[point] or not children[point]:
            owed[point] = own
        owed[parents[point]] += owed[point]
    return owed[0] > 2


def two_rounds_bound_s_per_byte(tree: NetworkTree) -> float:
    """The least time of an AllReduce of two rounds for each byte of the payload on each rank.

    In the first round contributions travel alone, as nothing has been added up. Let the N ranks be
    in parts of at most half of them; then 2·(N - n) messages of each element cross into parts,
    where n is the size of the largest. For let a part of m ranks get fewer than the N - m
    contributions of others in the first round: then each of its ranks needs a message from outside
    in the second. If all parts are so, these are N messages, or 2·N; where a rank needs only one,
    its sender's part and its own have got all contributions but their own 2·n in the first round.
    If one part got all N - m, each other one of k ranks gets at least k messages in one of the
    rounds. The parts here are the points of one depth of the tree.
    """
    most = 0.0
    for depth in range(1, len(tree.paths)):
        points = sorted(set(tree.paths[depth].tolist()))
        largest = max(last - first for first, last in (tree.spans[point] for point in points))
        betas = [float(tree.down_s_per_byte[point]) for point in points]
        if 2 * largest <= tree.size and min(betas) > 0:
            most = max(most, 2 * (tree.size - largest) / sum(1 / beta for beta in betas))
    return most


def one_round_bound_s_per_byte(tree: NetworkTree) -> float:
    """The least time of an AllReduce of one round for each byte of the payload on each rank.

    Contributions travel alone, and each rank needs those of all others: n·(N - n) messages of each
    element cross into a part of n ranks, and as many leave it.
    """
    counts = np.array([last - first for first, last in tree.spans])
    betas = np.maximum(tree.up_s_per_byte, tree.down_s_per_byte)
    return float((counts * (tree.size - counts) * betas).max())


def allreduce_bound_s(tree: NetworkTree, constants: Constants, payload_bytes: float) -> float:
    """The least time of an AllReduce by GenModel, whatever it does, with pipelined chunks or not.

    Links are busy as long as the cut bound says, in one round and in two as
    `one_round_bound_s_per_byte` and `two_rounds_bound_s_per_byte` say; the ranks' memories for the
    N - 1 additions and N + 1 accesses of each element, which is once for a sum of all operands. In
    one round each rank must add all of it up.
    A first chunk has its messages and its sums behind one another; each further one costs a round,
    and at best the longer of the two.
    """
    if tree.size < 2:
        return 0.0
    ranks, leaves = tree.size, list(tree.leaves)
    alpha_s = constants.alpha_s
    round_s = alpha_s + 2 * float(tree.latency_s[leaves].min())
    least_delta = float(memory_s_per_byte(tree, constants).min())
    sums = (ranks - 1) * constants.gamma_s_per_byte + (ranks + 1) * least_delta
    byte_s = payload_bytes * constants.beta_ratio
    cut = cut_bound_s_per_byte(tree)
    one = max(cut, one_round_bound_s_per_byte(tree))
    two = max(cut, two_rounds_bound_s_per_byte(tree))
    sums_s = payload_bytes * sums / ranks
    return min(
        round_s + _together_s(byte_s * one, ranks * sums_s, alpha_s),
        2 * round_s + _together_s(byte_s * two, sums_s, alpha_s),
        3 * round_s + _together_s(byte_s * cut, sums_s, alpha_s),
    )


def _together_s(one_s: float, other_s: float, alpha_s: float) -> float:
    """Two kinds of work behind one another, in the best number of chunks."""
    less_s, more_s = sorted((one_s, other_s))
    apart_s = less_s
    if alpha_s < less_s:
        apart_s = 2 * math.sqrt(alpha_s * less_s) - alpha_s
    return more_s + apart_s
