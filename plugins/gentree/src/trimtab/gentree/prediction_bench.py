"""How well GenModel predicts real collectives, beside latency and bandwidth alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.core.cost import GenModel, Run, fit_model, fit_plain_model, prediction_error
from trimtab.core.documents import parse_json, validate
from trimtab.core.errors import TrimtabError
from trimtab.hosts.testbed import TreeNetwork, obstacle, two_tiers

HOSTS = 8
BYTES_PER_S = 6.25e6
TIMEOUT_S = 400


@dataclass(frozen=True)
class Star:
    """Hosts on one switch.

    Attributes:
        name: of the case.
        queue_bytes: what a port of the switch holds before it drops.
        sysctls: of each host.
    """

    name: str
    queue_bytes: int
    sysctls: Mapping[str, str]


# Reno, as the rate-probing BBR fills no queue. The least timeout of data centres keeps a lost
# message from costing more than all others together.
_RENO = {"net.ipv4.tcp_congestion_control": "reno"}
STARS = (
    Star("deep-queues", 2**20, _RENO),
    Star("shallow-queues", 2**14, {**_RENO, "net.ipv4.tcp_rto_min_us": "20000"}),
)

FITTED_BYTES, HELD_OUT_BYTES = (2**18, 2**21), (2**19, 2**20)
QUICK_FITTED_BYTES, QUICK_HELD_OUT_BYTES = (2**16, 2**18), (2**17,)


def prediction_cases(options: Options, progress: Progress) -> list[Case]:
    """Errors on sizes that the models were not fitted to, on stars with deep and shallow queues.

    Where this machine has no network namespaces, or no torch, there are no cases.

    Raises:
        TrimtabError: the job failed.
    """
    reason = obstacle() or (None if find_spec("torch") else "torch is not installed")
    if reason:
        progress(f"the model's predictions are left out: {reason}")
        return []
    fitted = QUICK_FITTED_BYTES if options.quick else FITTED_BYTES
    held_out = QUICK_HELD_OUT_BYTES if options.quick else HELD_OUT_BYTES
    repeats = 1 if options.quick else 3
    cases = []
    for star in STARS[:1] if options.quick else STARS:
        progress(f"the model's predictions: {star.name}")
        runs = timed(star, sorted((*fitted, *held_out)), repeats)
        cases.append(compared(star.name, runs, held_out, options.seed))
    return cases


def compared(name: str, runs: Sequence[Run], held_out: Sequence[int], seed: int) -> Case:
    """Both models fitted on some sizes and tested on the others; extremes over those sizes."""
    known = [run for run in runs if run.payload_bytes not in held_out]
    asked = [r for r in runs if r.payload_bytes in held_out and r.algorithm in ("staged", "ring")]
    fit = fit_model(known, seed=seed)
    plain = fit_plain_model([run for run in known if run.algorithm != "sum"])
    errors = [
        (_error(plain, asked, size), _error(fit.model, asked, size)) for size in sorted(held_out)
    ]
    model = fit.model
    return Case.compare(
        f"model/{name}",
        "prediction_error",
        "1",
        "lower",
        "latency and bandwidth alone",
        errors,
        notes=f"{len(asked)} AllReduces of {min(held_out)} to {max(held_out)} bytes, fitted to "
        f"{len(known)} runs of other sizes; incast beyond {model.incast_threshold} costs "
        f"{model.epsilon_s_per_byte / model.beta_s_per_byte:.2f} of a byte's time per sender",
    )


def _error(model: GenModel, runs: Sequence[Run], size: int) -> float:
    return prediction_error(model, [run for run in runs if run.payload_bytes == size])


def timed(star: Star, sizes: Sequence[int], repeats: int) -> list[Run]:
    """Times collectives on the hosts of a star.

    Raises:
        TrimtabError: the job failed.
    """
    network = two_tiers([HOSTS], host_bytes_per_s=BYTES_PER_S, uplink_bytes_per_s=BYTES_PER_S)
    hosts = [node.name for node in network.nodes]
    module = [sys.executable, "-m", "trimtab.hosts.torch.collective_profile"]
    words = [*module, ",".join(map(str, sizes)), str(repeats)]
    job = {"WORLD_SIZE": str(HOSTS), "MASTER_ADDR": hosts[0], "MASTER_PORT": "29500"}
    env = {**job, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    with TreeNetwork(network, queue_bytes=star.queue_bytes, sysctls=star.sysctls) as up:
        done = up.run_all(
            {host: ["env", f"RANK={rank}", *words] for rank, host in enumerate(hosts)},
            env=env,
            timeout_s=TIMEOUT_S,
        )
    first = done[hosts[0]]
    failed = next((each for each in done.values() if each.returncode), None)
    if failed is not None:
        last = (failed.stderr.strip() or "no message").splitlines()[-1]
        raise TrimtabError(f"the job on namespaced hosts failed: {last}")
    where = "the job"
    return validate(list[Run], parse_json(first.stdout, where=where), where=where)
