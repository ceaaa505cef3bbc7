"""``trimtab bench gentree``: plans by the model on large trees, and real ones on hosts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from trimtab.core.benchmark import Benchmark, Case, Options, Progress
from trimtab.core.cluster import Cluster, Link, Node
from trimtab.core.collectives import NetworkTree
from trimtab.core.cost import Constants, cut_bound_s_per_byte
from trimtab.gentree.gentree import PAPER, Search
from trimtab.gentree.planner import Choice, choose
from trimtab.gentree.prediction_bench import prediction_cases
from trimtab.gentree.real_bench import real_cases
from trimtab.gentree.regret_bench import regret_cases

Shape = tuple[int, ...]

SHAPES: dict[str, Shape] = {
    "24": (24,),
    "32": (32,),
    "4x4": (4,) * 4,
    "8x8": (8,) * 8,
    "16x24": (24,) * 16,
    "16x32": (32,) * 16,
    "8x32+8x16": (32,) * 8 + (16,) * 8,
}
QUICK = ("24", "4x4", "8x8")

FLOATS = (1e6, 1e7, 1e8)
LARGE_BYTES = (2**24, 2**26, 2**28, 2**32)
BOUND_SHARE = 0.85
"""What share of the cut bound plans shall reach for such payloads."""

ALPHAS = {"4ms": 4e-3, "50us": 50e-6}
WIDTHS = ("rate", "ports", "sources")

# Constants of a public cost model of this family, for floats of 4 bytes: 3.2 ns each on a host's
# link and a tenth of that above, .4 ns to add or to access, a sixteenth more for each sender
# beyond nine.
HOST_S_PER_BYTE = 0.8e-9
UPLINKS_FASTER = 10
PER_BYTE_S = 1e-10


DEAR = Constants(
    alpha_s=50e-6,
    gamma_s_per_byte=PER_BYTE_S,
    delta_s_per_byte=10 * PER_BYTE_S,
    epsilon_ratio=1.0,
    width="ports",
)
"""Where incast and memory decide: each sender beyond nine costs a byte's time once more, and memory
is as slow as the network. Many rounds cost rings, wide exchanges incast, and halving memory."""
DEAR_RACKS, DEAR_UPLINKS_FASTER, DEAR_BYTES = (48,) * 16, 4, 2e6


def two_tiers(hosts: Shape, uplinks_faster: float = UPLINKS_FASTER) -> Cluster:
    """Hosts below leaf switches below a core, or below one switch."""
    links, names = [], iter(range(sum(hosts)))
    for leaf, count in enumerate(hosts):
        links += [
            _link(f"n{next(names)}", f"leaf{leaf}", 1 / HOST_S_PER_BYTE) for _ in range(count)
        ]
    switches = [f"leaf{leaf}" for leaf in range(len(hosts))]
    if len(hosts) > 1:
        rate = uplinks_faster / HOST_S_PER_BYTE
        links += [_link(leaf, "core", rate) for leaf in switches]
        switches.append("core")
    nodes = tuple(Node(name=f"n{i}", device="cpu") for i in range(sum(hosts)))
    return Cluster(nodes=nodes, switches=tuple(switches), links=tuple(links))


def _link(a: str, b: str, bandwidth_bytes_per_s: float) -> Link:
    return Link(a=a, b=b, bandwidth_bytes_per_s=bandwidth_bytes_per_s, latency_s=0)


def constants(alpha_s: float, width: str) -> Constants:
    """The constants of the cases on paper."""
    return Constants.model_validate(
        {
            "alpha_s": alpha_s,
            "gamma_s_per_byte": PER_BYTE_S,
            "delta_s_per_byte": PER_BYTE_S,
            "width": width,
        }
    )


def simulator_cases(options: Options, progress: Progress) -> Iterator[Case]:
    """Times by the model on trees: ours against algorithms of libraries and the best of them."""
    names = QUICK if options.quick else tuple(SHAPES)
    for number, name in enumerate(names):
        progress(f"trees by the model: {name}", number / len(names))
        tree = NetworkTree.of_cluster(two_tiers(SHAPES[name]))
        for regime, alpha_s in ALPHAS.items():
            for width in WIDTHS:
                for floats in FLOATS:
                    case = f"simulator/{name}/alpha-{regime}/{width}/{floats:.0e}-floats"
                    yield from _model_cases(case, tree, constants(alpha_s, width), 4 * floats)


def _model_cases(
    case: str, tree: NetworkTree, given: Constants, payload_bytes: float
) -> Iterator[Case]:
    choice = choose(tree, payload_bytes, given)
    paper = choose(tree, payload_bytes, given, search=PAPER)
    yield from _against_libraries(case, choice, {"gentree as published": paper.seconds})


def _against_libraries(
    case: str, choice: Choice, others_s: Mapping[str, float] | None = None
) -> Iterator[Case]:
    """The chosen plan against algorithms of libraries, the best of them, and further ones."""
    rivals = dict(choice.baselines_s)
    rivals["best of all baselines"] = min(rivals.values())
    for baseline, seconds in {**rivals, **(others_s or {})}.items():
        yield Case.compare(
            case,
            "allreduce_s",
            "s",
            "lower",
            baseline,
            [(seconds, choice.seconds)],
            lower_bound=choice.bound_s,
            notes=f"{choice.switches[-1][1]} at the root, {choice.schedule.chunks} chunks",
        )


def dear_cases(options: Options, progress: Progress) -> Iterator[Case]:
    """One regime in which no algorithm of a library suits: with chunks, and without any."""
    if options.quick:
        return
    progress("trees by the model: dear incast and memory")
    tree = NetworkTree.of_cluster(two_tiers(DEAR_RACKS, DEAR_UPLINKS_FASTER))
    for name, search in (("chunks", Search()), ("no-chunks", Search(chunks=False))):
        choice = choose(tree, DEAR_BYTES, DEAR, search=search)
        yield from _against_libraries(f"simulator/16x48/dear-incast-and-memory/{name}", choice)


def bound_cases(options: Options, progress: Progress) -> Iterator[Case]:
    """What share of the bounds large plans and the best algorithm of a library reach.

    The cut bound is of the links alone; the other one knows rounds and memory too, and therefore
    what share of the first one any AllReduce can reach.
    """
    names = QUICK if options.quick else tuple(SHAPES)
    sizes = LARGE_BYTES[:1] if options.quick else LARGE_BYTES
    for name in names:
        progress(f"shares of the cut bound: {name}")
        tree = NetworkTree.of_cluster(two_tiers(SHAPES[name]))
        bound_s_per_byte = cut_bound_s_per_byte(tree)
        for regime, alpha_s in ALPHAS.items():
            given = constants(alpha_s, "rate")
            for size in sizes:
                choice = choose(tree, size, given)
                case = f"simulator/{name}/alpha-{regime}/cut-bound/{size}-bytes"
                yield from _shares(case, choice, size * bound_s_per_byte)


def _shares(case: str, choice: Choice, cut_s: float) -> Iterator[Case]:
    """Ours against the best algorithm of a library, as shares of both bounds."""
    baseline = min(choice.baselines_s, key=lambda name: choice.baselines_s[name])
    theirs_s, most = choice.baselines_s[baseline], cut_s / choice.bound_s
    goal = f"the goal of {BOUND_SHARE:g} is " + (
        f"beyond any: at most {most:.4f} is possible"
        if most < BOUND_SHARE
        else f"possible: at most {most:.4f} is"
    )
    for metric, bound_s in (
        ("share_of_cut_bound", cut_s),
        ("share_of_bound_with_rounds_and_memory", choice.bound_s),
    ):
        yield Case.compare(
            case,
            metric,
            "1",
            "higher",
            "best of all baselines",
            [(bound_s / theirs_s, bound_s / choice.seconds)],
            notes=f"the best one is {baseline}; {goal}",
        )


def planning_cases(options: Options, progress: Progress) -> Iterator[Case]:
    """CPU time to plan, against what an operator would wait."""
    sizes = {512: ((32,) * 16, 0.3), 4096: ((64,) * 64, 5.0)}
    for servers, (hosts, budget_s) in sizes.items():
        progress(f"planning {servers} servers")
        tree = NetworkTree.of_cluster(two_tiers(hosts))
        given = constants(ALPHAS["4ms"], "rate")
        started_s = time.process_time()
        choose(tree, 4e7, given)
        yield Case.compare(
            f"model/planning-time/{servers}-servers",
            "planning_cpu_time",
            "s",
            "lower",
            f"budget of {budget_s:g} s",
            [(budget_s, time.process_time() - started_s)],
        )


def run(options: Options, progress: Progress) -> list[Case]:
    """All cases."""
    return [
        *simulator_cases(options, progress),
        *dear_cases(options, progress),
        *bound_cases(options, progress),
        *planning_cases(options, progress),
        *prediction_cases(options, progress),
        *real_cases(options, progress),
        *regret_cases(options, progress),
    ]


BENCHMARK = Benchmark(
    name="gentree",
    summary="AllReduce plans by the model on large trees, and real ones on namespaced hosts",
    run=run,
)
