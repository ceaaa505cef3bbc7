"""A tree of shaped links in network namespaces, and processes that run on its hosts.

Each node and switch of a `Cluster` becomes a network namespace, each link a veth pair whose two
ends carry the link's bandwidth with a token bucket. Latency cannot be shaped: few kernels have
netem, and the natural one is about half a millisecond.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import networkx as nx

from trimtab.core.cluster import Cluster, Link, Node
from trimtab.core.errors import BadInput, Unsupported

QUEUE_BYTES = 256 * 1024
"""What each end of a link holds back before it drops; less makes incast collapse."""

MAX_HOSTS = 250

_PREFIX = "trimtab-"
_COMMAND_TIMEOUT_S = 30
_NUMBERS = itertools.count()

# Host names and addresses are known on the host alone, as they would be on a machine of its own.
_ENTER = (
    'mount --bind "$1" /etc/hosts && echo "$2" > /proc/sys/kernel/hostname && shift 2 && exec "$@"'
)


def two_tiers(
    hosts_per_leaf: Sequence[int],
    *,
    host_bytes_per_s: float,
    uplink_bytes_per_s: float,
    devices_per_host: int = 1,
) -> Cluster:
    """Hosts ``h0``, ``h1``, … below switches ``leaf0``, … below ``core``.

    Args:
        hosts_per_leaf: how many hosts each leaf has.
        host_bytes_per_s: bandwidth of each host's link.
        uplink_bytes_per_s: bandwidth of each leaf's link to the core.
        devices_per_host: CPUs that each host shall count as devices.
    """
    names = (f"h{number}" for number in itertools.count())
    leaves = {f"leaf{i}": list(itertools.islice(names, n)) for i, n in enumerate(hosts_per_leaf)}
    links = [
        Link(a=host, b=leaf, bandwidth_bytes_per_s=host_bytes_per_s)
        for leaf, hosts in leaves.items()
        for host in hosts
    ]
    links += [Link(a=leaf, b="core", bandwidth_bytes_per_s=uplink_bytes_per_s) for leaf in leaves]
    nodes = [
        Node(name=h, device="cpu", count=devices_per_host) for hs in leaves.values() for h in hs
    ]
    return Cluster(nodes=tuple(nodes), switches=(*leaves, "core"), links=tuple(links))


@cache
def obstacle() -> str | None:
    """Why this machine can make no such network; None if it can."""
    try:
        with TreeNetwork(two_tiers([1, 1], host_bytes_per_s=1e7, uplink_bytes_per_s=1e7)) as tried:
            done = tried.run("h0", ["true"], timeout_s=_COMMAND_TIMEOUT_S)
            return None if done.returncode == 0 else f"no program runs in it ({done.stderr})"
    except Unsupported as error:
        return error.what


class TreeNetwork:
    """The hosts of a cluster as network namespaces, for as long as a ``with`` block lasts.

    At its end, however it comes, every process on the hosts is killed and nothing is left. What
    an earlier run left because it was killed itself is removed at the next start.

    Args:
        cluster: its links form a tree in which each node hangs on one switch. Latencies are not
            applied.
        queue_bytes: what each end of a link holds back before it drops.
        sysctls: settings of each host, e.g. ``{"net.ipv4.tcp_rto_min_us": "5000"}``.

    Attributes:
        addresses: the IPv4 address of each host, which the hosts also know by its name.

    Raises:
        BadInput: the links form no such tree.
        Unsupported: this machine cannot make network namespaces, or shape links.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        queue_bytes: int = QUEUE_BYTES,
        sysctls: Mapping[str, str] | None = None,
    ) -> None:
        _check_tree(cluster)
        self.cluster = cluster
        self.addresses = {
            node.name: f"10.77.0.{number}" for number, node in enumerate(cluster.nodes, 1)
        }
        self._queue_bytes = queue_bytes
        self._sysctls = dict(sysctls or {})
        self._stem = f"{_PREFIX}{os.getpid()}-{next(_NUMBERS)}-"
        points = [*self.addresses, *cluster.switches]
        self._namespaces = {name: f"{self._stem}{i}" for i, name in enumerate(points)}
        self._folder: Path | None = None
        self._processes: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> TreeNetwork:
        _require_tools()
        _remove(_abandoned())
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills what runs on the hosts and removes the network; may be called again."""
        _remove([name for name in _namespaces() if name.startswith(self._stem)])
        for process in self._processes:
            process.wait()
        self._processes.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def command(self, host: str, argv: Sequence[str]) -> list[str]:
        """The command that runs another one on a host; its streams and status are the other's."""
        if self._folder is None:
            raise BadInput("the network is not up", fix="use it in a with block")
        if host not in self.addresses:
            raise BadInput(
                f"there is no host {host!r}", fix=f"known are {', '.join(self.addresses)}"
            )
        namespace = ["ip", "netns", "exec", self._namespaces[host], "unshare", "--uts"]
        return [*namespace, "sh", "-c", _ENTER, "sh", str(self._hosts_file), host, *argv]

    def start(
        self,
        host: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.PIPE,
    ) -> subprocess.Popen[str]:
        """Starts a program on a host, in a session of its own.

        Args:
            host: a node of the cluster.
            argv: the program and its arguments.
            env: variables beside this process's own.
            cwd: the folder it starts in.
            stdout: as for `subprocess.Popen`.
            stderr: as for `subprocess.Popen`.
        """
        process = subprocess.Popen(
            self.command(host, argv),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def run(
        self,
        host: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        timeout_s: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program on a host to its end.

        Raises:
            subprocess.TimeoutExpired: it took longer; it and its children were killed.
        """
        return self.run_all({host: argv}, env=env, cwd=cwd, timeout_s=timeout_s)[host]

    def run_all(
        self,
        argv: Mapping[str, Sequence[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        timeout_s: float = 60,
    ) -> dict[str, subprocess.CompletedProcess[str]]:
        """Runs one program on each of several hosts at once, to the end of the last.

        Args:
            argv: for each host the program and its arguments.
            env: variables beside this process's own, the same on each.
            cwd: the folder they start in.
            timeout_s: for all of them together.

        Raises:
            subprocess.TimeoutExpired: they took longer; they and their children were killed.
        """
        started = {
            host: self._start_into_files(host, words, env, cwd) for host, words in argv.items()
        }
        deadline_s = time.monotonic() + timeout_s
        try:
            for process, _, _ in started.values():
                process.wait(max(0.0, deadline_s - time.monotonic()))
        finally:
            for process, _, _ in started.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return {
            host: subprocess.CompletedProcess(
                argv[host], process.returncode, stdout.read_text(), stderr.read_text()
            )
            for host, (process, stdout, stderr) in started.items()
        }

    def _start_into_files(
        self,
        host: str,
        argv: Sequence[str],
        env: Mapping[str, str] | None,
        cwd: str | Path | None,
    ) -> tuple[subprocess.Popen[str], Path, Path]:
        """Starts a program whose output goes to files: many pipes would have to be drained."""
        assert self._folder is not None
        stem = self._folder / f"{len(self._processes)}-{self._namespaces[host]}"
        out, err = stem.with_suffix(".out"), stem.with_suffix(".err")
        with out.open("w") as stdout, err.open("w") as stderr:
            return self.start(host, argv, env=env, cwd=cwd, stdout=stdout, stderr=stderr), out, err

    @property
    def _hosts_file(self) -> Path:
        assert self._folder is not None
        return self._folder / "hosts"

    def _build(self) -> None:
        known = "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        self._hosts_file.write_text(f"127.0.0.1 localhost\n{known}")
        _batch([], [f"netns add {name}" for name in self._namespaces.values()])
        for switch in self.cluster.switches:
            self._inside(switch, ["link add br0 type bridge stp_state 0", "link set br0 up"])
        ports = {name: itertools.count() for name in self._namespaces}
        for link in self.cluster.links:
            self._join(link, ports)
        for name, address in self.addresses.items():
            self._inside(name, ["link set lo up", f"addr add {address}/16 dev eth0"])
            for key, value in self._sysctls.items():
                entry = Path("/proc/sys", key.replace(".", "/"))
                _call(self.command(name, ["sh", "-c", f'echo "$1" > {entry}', "sh", value]))

    def _join(self, link: Link, ports: Mapping[str, Any]) -> None:
        """Lays one link: two shaped interfaces, each on the bridge if its end is a switch."""
        names = {end: f"{self._kind(end)}{next(ports[end])}" for end in (link.a, link.b)}
        far = f"peer name {names[link.b]} netns {self._namespaces[link.b]}"
        self._inside(link.a, [f"link add {names[link.a]} type veth {far}"])
        for end, interface in names.items():
            bridged = [] if end in self.addresses else [f"link set {interface} master br0"]
            quiet = f"link set {interface} addrgenmode none"
            self._inside(end, [quiet, *bridged, f"link set {interface} up"])
            shaping = _shaping(link.bandwidth_bytes_per_s, self._queue_bytes)
            namespace = self._namespaces[end]
            _call(["tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root", *shaping])

    def _kind(self, point: str) -> str:
        return "eth" if point in self.addresses else "port"

    def _inside(self, point: str, lines: Sequence[str]) -> None:
        _batch(["-n", self._namespaces[point]], lines)


def _check_tree(cluster: Cluster) -> None:
    if not nx.is_tree(cluster.graph):
        raise BadInput(
            f"the links of {cluster.name} form no tree",
            fix="give links that lead from each node to each other in one way",
        )
    if len(cluster.nodes) > MAX_HOSTS:
        raise BadInput(f"there are {len(cluster.nodes)} hosts", fix=f"give at most {MAX_HOSTS}")
    for node in cluster.nodes:
        ends = list(cluster.graph[node.name])
        if len(ends) != 1 or ends[0] not in cluster.switches:
            raise BadInput(f"{node.name!r} hangs on {ends}", fix="hang each node on one switch")


def _shaping(bandwidth_bytes_per_s: float, queue_bytes: int) -> list[str]:
    # A bucket of a millisecond: less starves fast links, more lets short messages pass unshaped.
    bucket_bytes = max(8_000, int(bandwidth_bytes_per_s * 1e-3))
    rate_bits_per_s = int(8 * bandwidth_bytes_per_s)
    shape = f"tbf rate {rate_bits_per_s}bit burst {bucket_bytes} limit {queue_bytes}"
    return shape.split()


def _require_tools() -> None:
    missing = [tool for tool in ("ip", "tc", "unshare", "mount") if shutil.which(tool) is None]
    if missing:
        raise Unsupported(
            f"there is no program {missing[0]!r}", fix="install iproute2 and util-linux"
        )
    if os.geteuid() != 0:
        raise Unsupported("only root may make network namespaces", fix="run as root")


def _namespaces() -> list[str]:
    done = subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S
    )
    return [line.split()[0] for line in done.stdout.splitlines() if line.startswith(_PREFIX)]


def _abandoned() -> list[str]:
    """The namespaces of runs that ended without removing them."""
    return [name for name in _namespaces() if not _runs(name.removeprefix(_PREFIX).split("-")[0])]


def _runs(pid: str) -> bool:
    return not pid.isdecimal() or Path("/proc", pid).exists()


def _remove(namespaces: Sequence[str]) -> None:
    """Kills what runs in the namespaces and removes them; none keeps another from it."""
    for name in namespaces:
        for _ in range(20):  # one that dies may just have started another
            pids = _pids(name)
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not pids:
                break
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _pids(namespace: str) -> list[int]:
    done = subprocess.run(
        ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in done.stdout.split()]


def _batch(options: Sequence[str], lines: Sequence[str]) -> None:
    _call(["ip", *options, "-batch", "-"], "\n".join(lines) + "\n")


def _call(words: Sequence[str], text: str = "") -> None:
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unsupported(f"{words[0]} does not run ({error})") from None
    if done.returncode:
        raise Unsupported(
            f"this machine makes no shaped network ({words[0]}: {done.stderr.strip()[:200]})",
            fix="run as root on Linux with network namespaces, veth, bridges and tc's tbf",
        )
