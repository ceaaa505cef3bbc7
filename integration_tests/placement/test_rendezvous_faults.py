"""Our rendezvous among real torchrun agents on one machine, each under the name of another."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from trimtab.hosts.torch.rendezvous import PlannedRendezvous

pytestmark = [pytest.mark.integration, pytest.mark.slow]

TIMEOUT_S = 150

# Says who has which rank. With DIES, that host fails in the first run once all are there, and the
# others wait for it.
RANK = """
import os, pathlib, sys, time
host, rank = os.environ["TRIMTAB_HOST"], os.environ["RANK"]
been_here = pathlib.Path(__file__).with_name(f"been-{os.getppid()}")
again = int(been_here.exists())
os.write(1, f"run {again}: rank {rank} on {host}\\n".encode())
been_here.touch()
if os.environ.get("STORE"):
    from torch import distributed
    distributed.init_process_group("gloo")
    distributed.barrier()
    distributed.destroy_process_group()
if os.environ.get("DIES") and not again:
    while len([*been_here.parent.glob("been-*")]) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)
    time.sleep(0 if host == os.environ["DIES"] else 600)
    sys.exit(3)
"""


@pytest.fixture
def agents(tmp_path, free_port):
    """Runs one torchrun for each host, in the order of a hostfile, and returns status and text."""
    script, order = tmp_path / "rank.py", tmp_path / "order"
    script.write_text(RANK)
    started: list[subprocess.Popen[str]] = []

    def run(
        planned: str, hosts: Sequence[str], *options: str, **more: str
    ) -> list[tuple[int, str, str]]:
        order.write_text("".join(f"{host} slots=1\n" for host in planned))
        words = ["--rdzv-backend", "trimtab", "--rdzv-endpoint", f"127.0.0.1:{free_port}"]
        words += ["--nnodes", str(len(hosts)), "--nproc-per-node", "1", *options, str(script)]
        for at, host in enumerate(hosts):
            environment = {
                **os.environ,
                "TRIMTAB_HOST": host,
                "TRIMTAB_PLAN": str(order),
                "OMP_NUM_THREADS": "1",
                **more,
            }
            # The c10d rendezvous sorts by this address: the first agent would be the first rank.
            own = ["--local-addr", f"127.0.0.{at + 1}"]
            process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *own, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                start_new_session=True,
            )
            started.append(process)
        texts = [process.communicate(timeout=TIMEOUT_S) for process in started]
        return [(p.returncode, *text) for p, text in zip(started, texts, strict=True)]

    yield run
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def ranks(ended: list[tuple[int, str, str]], again: int = 0) -> list[str]:
    text = "".join(stdout for _, stdout, _ in ended)
    pairs = sorted(re.findall(rf"^run {again}: rank (\d+) on (\w+)$", text, re.MULTILINE))
    return [host for _, host in pairs]


def test_restarts_keep_the_plans_order(agents) -> None:
    ended = agents("cab", ["a", "b", "c"], "--max-restarts", "1", DIES="b")
    assert [status for status, _, _ in ended] == [0, 0, 0], ended
    assert ranks(ended) == ranks(ended, again=1) == ["c", "a", "b"]


def test_a_node_that_the_plan_does_not_know_comes_last_with_a_warning(agents) -> None:
    ended = agents("cb", ["a", "b", "c"])
    assert [status for status, _, _ in ended] == [0, 0, 0], ended
    assert ranks(ended) == ["c", "b", "a"]
    told = "".join(stderr for _, _, stderr in ended)
    sentence = "trimtab: the nodes that are there differ from the plan's: a is not planned."
    assert told.count(sentence) == 1


def test_strict_refuses_a_lost_and_an_unknown_node_on_every_host(agents) -> None:
    ended = agents("bz", ["a", "b"], "--rdzv-conf", "strict=true")
    assert all(status for status, _, _ in ended)
    assert ranks(ended) == []
    for _, _, stderr in ended:
        assert "differ from the plan's: z is missing and a is not planned." in stderr


def test_two_agents_on_one_host_and_workers_that_host_their_own_store(agents) -> None:
    ended = agents("ba", ["a", "b", "b"], STORE="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert [status for status, _, _ in ended] == [0, 0, 0], ended
    assert ranks(ended) == ["b", "b", "a"]


def test_a_rendezvous_without_a_plan_is_refused_in_one_sentence(agents, free_port) -> None:
    ended = agents("a", ["a"], TRIMTAB_PLAN="")
    assert ended[0][0] != 0
    last = ended[0][2].strip().splitlines()[-1]
    assert "--rdzv-backend trimtab has no plan; name one by --rdzv-conf plan=FILE" in last


class Inner(RendezvousHandler):
    """A rendezvous of two nodes that has come about."""

    def __init__(self, store: Store, rank: int) -> None:
        self.found = RendezvousInfo(store, rank, 2, RendezvousStoreInfo("first", 1))
        self.closed = False

    use_agent_store = True

    def get_backend(self) -> str:
        return "inner"

    def next_rendezvous(self) -> RendezvousInfo:
        return self.found

    def is_closed(self) -> bool:
        return self.closed

    def set_closed(self) -> None:
        self.closed = True

    def num_nodes_waiting(self) -> int:
        return 7

    def get_run_id(self) -> str:
        return "run"

    def shutdown(self) -> bool:
        return True


PARAMETERS = RendezvousParameters("trimtab", "localhost:0", "run", 1, 2)


def store() -> Store:
    held = HashStore()
    held.set_timeout(timedelta(seconds=0.2))
    return held


@pytest.mark.parametrize(("rank", "lost"), [(0, "node 1"), (1, "the first node")])
def test_a_node_that_is_lost_after_it_came(rank, lost) -> None:
    rendezvous = PlannedRendezvous(Inner(store(), rank), PARAMETERS, ["a", "b"])
    sentence = f"{lost} came to the rendezvous and then said nothing"
    with pytest.raises(RendezvousTimeoutError, match=sentence):
        rendezvous.next_rendezvous()


def test_the_rest_is_the_inner_rendezvous_own(monkeypatch) -> None:
    shared = store()
    inner = Inner(shared, 1)
    rendezvous = PlannedRendezvous(inner, PARAMETERS, ["b", "a"])
    monkeypatch.setenv("TRIMTAB_HOST", "a")
    with pytest.raises(RendezvousTimeoutError):
        rendezvous.next_rendezvous()
    monkeypatch.setenv("TRIMTAB_HOST", "b")
    first = PlannedRendezvous(Inner(shared, 0), PARAMETERS, ["b", "a"]).next_rendezvous()
    assert (first.rank, first.world_size) == (0, 2)
    assert first.bootstrap_store_info == RendezvousStoreInfo("first", 1)
    assert rendezvous.get_backend() == "trimtab"
    assert rendezvous.use_agent_store
    assert (rendezvous.num_nodes_waiting(), rendezvous.get_run_id()) == (7, "run")
    assert rendezvous.shutdown()
    rendezvous.set_closed()
    assert rendezvous.is_closed()


def test_torch_finds_it_by_its_entry_point(tmp_path) -> None:
    order = tmp_path / "order"
    order.write_text("a slots=1\n")
    parameters = RendezvousParameters("trimtab", "localhost:0", "run", 1, 1, plan=str(order))
    handler = get_rendezvous_handler(parameters)
    assert isinstance(handler, PlannedRendezvous)
    handler.shutdown()
