"""What a training plan becomes for each launcher, and that its ranks can be read back from that."""

from __future__ import annotations

import os
import shlex
import subprocess
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.emitters import EMITTERS, emit
from trimtab.core.errors import BadInput, Unsupported
from trimtab.core.kubernetes_emitter import topology_annotations
from trimtab.core.plan import Objective, Plan, Slot
from trimtab.hosts.deepspeed.launching import read_hostfile
from trimtab.hosts.host_order import lookup
from trimtab.hosts.job_variables import PLAN_VARIABLE
from trimtab.hosts.torch.launching import BACKEND

OBJECTIVE = Objective(metric="weighted_spread", unit="1", better="lower", value=1)
TRAINING = ["deepspeed", "torchrun", "slurm", "kubernetes", "mpi"]


def plan_of(*ranks: tuple[str, int], **details: Any) -> Plan:
    slots = tuple(Slot(node=node, device=device) for node, device in ranks)
    return Plan(planner="placement", objective=OBJECTIVE, ranks=slots, details=details)


# n2 and n1 are in pod a, n4 and n3 in pod b.
PLAN = plan_of(
    *[(node, device) for node in ("n2", "n1", "n4", "n3") for device in (0, 1)],
    job={"name": "Llama 7B"},
    paths={
        "n1": ["a", "a1"],
        "n2": ["a", "a2"],
        "n3": ["b", "b1"],
        "n4": ["b", "b2"],
    },
)

GOLDEN = {
    "deepspeed": {
        "hostfile": """\
            n2 slots=2
            n1 slots=2
            n4 slots=2
            n3 slots=2
            """,
        "launch.sh": """\
            #!/usr/bin/env bash
            set -euo pipefail
            exec deepspeed --hostfile "$(dirname "$0")/hostfile" \
--master_addr n2 --master_port 29500 "$@"
            """,
    },
    "torchrun": {
        "hostfile": """\
            n2 slots=2
            n1 slots=2
            n4 slots=2
            n3 slots=2
            """,
        "ranks": """\
            0 n2 0
            1 n2 1
            2 n1 0
            3 n1 1
            4 n4 0
            5 n4 1
            6 n3 0
            7 n3 1
            """,
        "rendezvous.sh": """\
            #!/usr/bin/env bash
            set -euo pipefail
            # run on every node; give each job an RDZV_ID of its own
            export CUDA_VISIBLE_DEVICES=0,1
            TRIMTAB_PLAN="$(cd "$(dirname "$0")" && pwd)/hostfile"
            export TRIMTAB_PLAN
            exec torchrun --nnodes 4 --nproc-per-node 2 --rdzv-backend trimtab \
--rdzv-endpoint n2:29500 --rdzv-id "${RDZV_ID:-training}" "$@"
            """,
        "nodes": """\
            0 n2 0,1
            1 n1 0,1
            2 n4 0,1
            3 n3 0,1
            """,
        "launch.sh": """\
            #!/usr/bin/env bash
            set -euo pipefail
            folder="$(cd "$(dirname "$0")" && pwd)"
            # run on every node; TRIMTAB_HOST is its name in the plan, where it has another one
            own="${TRIMTAB_HOST:-$(uname -n)}" named="" alike="" times=0
            while read -r rank node devices; do
                [[ $node != "$own" ]] || named="$rank $devices"
                [[ ${node%%.*} != "${own%%.*}" ]] || { alike="$rank $devices" \
times=$((times + 1)); }
            done < "$folder/nodes"
            if [[ -z $named && ($times != 1 || $own =~ ^[0-9.]+$) ]]; then
                echo "launch.sh: this machine, '$own', is not one node of the plan; \
set TRIMTAB_HOST." >&2
                exit 2
            fi
            read -r rank devices <<< "${named:-$alike}"
            export CUDA_VISIBLE_DEVICES="$devices"
            exec torchrun --nnodes 4 --nproc-per-node 2 --master-addr n2 --master-port 29500 \
--node-rank "$rank" "$@"
            """,
    },
    "slurm": {
        "slurm-hostfile": """\
            n2
            n2
            n1
            n1
            n4
            n4
            n3
            n3
            """,
        "job.sbatch": """\
            #!/usr/bin/env bash
            # submit it in this folder: sbatch job.sbatch COMMAND …
            #SBATCH --nodes=4
            #SBATCH --ntasks=8
            #SBATCH --nodefile=slurm-nodes
            #SBATCH --gpus-per-node=2
            #SBATCH --exclusive
            set -euo pipefail
            folder="${SLURM_SUBMIT_DIR:-.}"
            export SLURM_HOSTFILE="$folder/slurm-hostfile"
            export MASTER_ADDR=n2 MASTER_PORT=29500
            export WORLD_SIZE=8
            srun --distribution=arbitrary bash -c 'CUDA_VISIBLE_DEVICES=$SLURM_LOCALID \
RANK=$SLURM_PROCID LOCAL_RANK=0 exec "$@"' -- "$@"
            """,
        "slurm-nodes": """\
            n2
            n1
            n4
            n3
            """,
    },
    "mpi": {
        "rankfile": """\
            rank 0=n2 slot=0
            rank 1=n2 slot=1
            rank 2=n1 slot=0
            rank 3=n1 slot=1
            rank 4=n4 slot=0
            rank 5=n4 slot=1
            rank 6=n3 slot=0
            rank 7=n3 slot=1
            """,
        "launch.sh": """\
            #!/usr/bin/env bash
            set -euo pipefail
            folder="$(cd "$(dirname "$0")" && pwd)"
            export MASTER_ADDR=n2 MASTER_PORT=29500
            export WORLD_SIZE=8
            exec mpirun -np 8 --map-by seq --bind-to none -x MASTER_ADDR -x MASTER_PORT \
-x WORLD_SIZE --hostfile "$folder/hostfile" bash -c \
'CUDA_VISIBLE_DEVICES=$OMPI_COMM_WORLD_LOCAL_RANK RANK=$OMPI_COMM_WORLD_RANK LOCAL_RANK=0 \
exec "$@"' -- "$@"
            """,
    },
    "kubernetes": {
        "jobset.yaml": """\
            # Set the image (it needs trimtab-core), the queue and the arguments of the job.
            # fabric.topograph.run/tier-N are NVIDIA Topograph's labels: put your cluster's in \
their place.
            # Then: kubectl apply --server-side -f jobset.yaml (else it keeps a copy, of at most \
256 KiB).
            ---
            apiVersion: v1
            kind: ConfigMap
            metadata:
              name: llama-7b-order
            data:
              hostfile: |
                n2 slots=2
                n1 slots=2
                n4 slots=2
                n3 slots=2
            ---
            apiVersion: jobset.x-k8s.io/v1alpha2
            kind: JobSet
            metadata:
              name: llama-7b
              labels:
                kueue.x-k8s.io/queue-name: user-queue
            spec:
              network:
                enableDNSHostnames: true
                subdomain: llama-7b
              replicatedJobs:
              - name: workers
                replicas: 1
                template:
                  spec:
                    parallelism: 4
                    completions: 4
                    completionMode: Indexed
                    backoffLimit: 0
                    template:
                      metadata:
                        annotations:
                          kueue.x-k8s.io/podset-preferred-topology: fabric.topograph.run/tier-1
                          kueue.x-k8s.io/podset-slice-required-topology: \
fabric.topograph.run/tier-1
                          kueue.x-k8s.io/podset-slice-size: '2'
                      spec:
                        restartPolicy: Never
                        affinity:
                          nodeAffinity:
                            requiredDuringSchedulingIgnoredDuringExecution:
                              nodeSelectorTerms:
                              - matchExpressions:
                                - key: kubernetes.io/hostname
                                  operator: In
                                  values:
                                  - n2
                                  - n1
                                  - n4
                                  - n3
                          podAntiAffinity:
                            requiredDuringSchedulingIgnoredDuringExecution:
                            - labelSelector:
                                matchLabels:
                                  jobset.sigs.k8s.io/jobset-name: llama-7b
                              topologyKey: kubernetes.io/hostname
                        containers:
                        - name: training
                          image: registry.example.com/training:latest
                          command:
                          - torchrun
                          - --nnodes
                          - '4'
                          - --nproc-per-node
                          - '2'
                          - --rdzv-backend
                          - trimtab
                          - --rdzv-id
                          - llama-7b
                          - --rdzv-endpoint
                          - llama-7b-workers-0-0.llama-7b:29500
                          args:
                          - train.py
                          env:
                          - name: TRIMTAB_PLAN
                            value: /etc/trimtab/hostfile
                          - name: TRIMTAB_HOST
                            valueFrom:
                              fieldRef:
                                fieldPath: spec.nodeName
                          ports:
                          - containerPort: 29500
                          resources:
                            limits:
                              nvidia.com/gpu: 2
                          volumeMounts:
                          - name: order
                            mountPath: /etc/trimtab
                        volumes:
                        - name: order
                          configMap:
                            name: llama-7b-order
            """,
    },
}


@pytest.mark.parametrize("target", TRAINING)
def test_files_are_as_they_were(target: str) -> None:
    files = emit(PLAN, target)
    assert {name: files[name] for name in GOLDEN[target]} == {
        name: dedent(text) for name, text in GOLDEN[target].items()
    }


def deepspeed_ranks(files: dict[str, str], tmp_path: Path) -> list[tuple[str, int]]:
    """As DeepSpeed numbers them: the hosts in the hostfile's order, all slots or those included."""
    (tmp_path / "hostfile").write_text(files["hostfile"])
    words = shlex.split(files["launch.sh"])
    order = read_hostfile(tmp_path / "hostfile")
    devices = {host: list(range(slots)) for host, slots in order.items()}
    if "--include" in words:
        included = dict(part.split(":") for part in words[words.index("--include") + 1].split("@"))
        assert all({*map(int, included[host].split(","))} <= {*devices[host]} for host in order)
        devices = {host: list(map(int, included[host].split(","))) for host in order}
    return [(host, device) for host in order for device in sorted(devices[host])]


def torchrun_ranks(files: dict[str, str]) -> list[tuple[str, int]]:
    """As torchrun numbers them: node rank by node rank, the visible devices in order."""
    rows = sorted((line.split() for line in files["nodes"].splitlines()), key=lambda r: int(r[0]))
    return [(host, int(device)) for _, host, numbers in rows for device in numbers.split(",")]


def mpi_ranks(files: dict[str, str]) -> list[tuple[str, int]]:
    rows = [line.replace("=", " ").split() for line in files["rankfile"].splitlines()]
    assert [int(row[1]) for row in rows] == list(range(len(rows)))
    assert files["hostfile"].split() == [row[2] for row in rows]
    ranks = [(row[2], int(row[4])) for row in rows]
    assert devices_of(files, files["launch.sh"], [host for host, _ in ranks]) == ranks
    return ranks


def slurm_ranks(files: dict[str, str]) -> list[tuple[str, int]]:
    hosts = files["slurm-hostfile"].split()
    assert sorted(files["slurm-nodes"].split()) == sorted(set(hosts))
    return devices_of(files, files["job.sbatch"], hosts)


def devices_of(files: dict[str, str], script: str, hosts: list[str]) -> list[tuple[str, int]]:
    """The device that a script gives each rank: by a file, or by its number on its host."""
    if "devices" in files:
        assert '< "$0"' in script
        return list(zip(hosts, map(int, files["devices"].split()), strict=True))
    local = [hosts[:rank].count(host) for rank, host in enumerate(hosts)]
    if "devices=(" in script:
        listed = script.split("devices=(")[1].split(")")[0].split()
        return [(host, int(listed[at])) for host, at in zip(hosts, local, strict=True)]
    return list(zip(hosts, local, strict=True))


def kubernetes_ranks(files: dict[str, str], tmp_path: Path) -> list[tuple[str, int]]:
    order, _ = yaml.safe_load_all(files["jobset.yaml"])
    (tmp_path / "order").write_text(order["data"]["hostfile"])
    hosts = read_hostfile(tmp_path / "order")
    return [(host, device) for host, count in hosts.items() for device in range(count)]


names = st.lists(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
    min_size=1,
    max_size=6,
    unique=True,
)


@given(names, st.integers(1, 4))
def test_every_launcher_numbers_ranks_as_the_plan_does(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], devices: int
) -> None:
    folder = tmp_path_factory.mktemp("files")
    ranks = [(node, device) for node in order for device in range(devices)]
    plan = plan_of(*ranks)
    assert deepspeed_ranks(emit(plan, "deepspeed"), folder) == ranks
    assert torchrun_ranks(emit(plan, "torchrun")) == ranks
    assert slurm_ranks(emit(plan, "slurm")) == ranks
    assert mpi_ranks(emit(plan, "mpi")) == ranks
    assert kubernetes_ranks(emit(plan, "kubernetes"), folder) == ranks


@given(st.permutations([(node, device) for node in "abc" for device in range(3)]))
def test_slurm_and_mpi_number_ranks_in_any_way(ranks: list[tuple[str, int]]) -> None:
    plan = plan_of(*ranks)
    assert slurm_ranks(emit(plan, "slurm")) == ranks
    assert mpi_ranks(emit(plan, "mpi")) == ranks


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param([("b", 1), ("a", 0), ("b", 0)], id="by a file"),
        pytest.param([("b", 3), ("a", 3), ("b", 1)], id="by a list"),
        pytest.param([("b", 0), ("a", 0), ("b", 1)], id="by the local rank"),
    ],
)
def test_mpi_starts_each_rank_on_its_host_and_device(
    tmp_path: Path, ranks: list[tuple[str, int]]
) -> None:
    """With an mpirun that starts a process for each line of the hostfile, as "seq" does."""
    for name, text in emit(plan_of(*ranks), "mpi").items():
        (tmp_path / name).write_text(text)
    fake = tmp_path / "mpirun"
    fake.write_text(
        dedent("""\
        #!/usr/bin/env bash
        rank=0
        declare -A local
        while [ "$1" != --hostfile ]; do shift; done
        while read -r node <&3; do
            OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_LOCAL_RANK=$((local[$node]++)) NODE=$node \
                "${@:3}"
            rank=$((rank + 1))
        done 3< "$2"
        """)
    )
    fake.chmod(0o755)
    show = 'echo "$RANK $NODE $CUDA_VISIBLE_DEVICES $WORLD_SIZE $MASTER_ADDR $1"'
    done = subprocess.run(
        ["bash", str(tmp_path / "launch.sh"), "bash", "-c", show, "_", "an argument"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        f"{rank} {node} {device} 3 b an argument" for rank, (node, device) in enumerate(ranks)
    ]


NAMED = plan_of(("b.x", 2), ("b.x", 3), ("c.x", 0), ("c.x", 1), ("c.y", 0), ("c.y", 1))


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ("b.x", "0 2,3"),
        ("b", "0 2,3"),
        ("b.elsewhere", "0 2,3"),
        ("c.y", "2 0,1"),
        ("c", None),
        ("c.z", None),
        ("z", None),
        ("10.0.0.7", "1 0,1"),
        ("10.0.0.8", None),
        ("", None),
    ],
)
def test_torchruns_script_finds_its_node_and_refuses_any_other_machine(
    tmp_path: Path, own: str, found: str | None
) -> None:
    """As `host_order.lookup` does: a name counts with and without its domain, an address whole."""
    plan = NAMED if not own.startswith("10.") else plan_of(("10.0.0.6", 0), ("10.0.0.6", 1),
        ("10.0.0.7", 0), ("10.0.0.7", 1))  # fmt: skip
    order = list(dict.fromkeys(slot.node for slot in plan.ranks))
    place = lookup(order)(own or os.uname().nodename)
    assert place == (None if found is None else int(found[0]))
    for name, text in emit(plan, "torchrun").items():
        (tmp_path / name).write_text(text)
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    done = subprocess.run(
        ["bash", str(tmp_path / "launch.sh"), "train.py", "two words"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", **({"TRIMTAB_HOST": own} if own else {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if found is None:
        assert (done.returncode, done.stdout) == (2, "")
        named = own or os.uname().nodename
        assert done.stderr == (
            f"launch.sh: this machine, '{named}', is not one node of the plan; set TRIMTAB_HOST.\n"
        )
        return
    rank, devices = found.split()
    assert done.stdout.split() == [
        *(devices, "--nnodes", str(len(order)), "--nproc-per-node", "2"),
        *("--master-addr", order[0], "--master-port", "29500", "--node-rank", rank),
        *("train.py", "two", "words"),
    ]


@cache
def large_plan(*, differing: bool = False) -> Plan:
    """12,000 nodes, each with its first eight devices, or with two that others do not have."""
    if not differing:
        return plan_of(*[(f"n{node:05}", device) for node in range(12_000) for device in range(8)])
    return plan_of(*[(f"n{n:05}", (n + device) % 8) for n in range(12_000) for device in (0, 1)])


@pytest.mark.parametrize("target", ["deepspeed", "torchrun", "slurm", "mpi"])
def test_large_plans_have_few_files_and_short_scripts(target: str) -> None:
    files = emit(large_plan(), target)
    assert len(files) <= 5
    assert all(len(text) < 2000 for text in files.values() if text.startswith("#!"))


@pytest.mark.parametrize("target", ["slurm", "mpi"])
def test_devices_of_large_plans_that_differ_from_node_to_node_are_in_a_file(target: str) -> None:
    plan = large_plan(differing=True)
    files = emit(plan, target)
    assert files["devices"].split() == [str(slot.device) for slot in plan.ranks]
    assert all(len(text) < 2000 for text in files.values() if text.startswith("#!"))


def test_deepspeed_starts_more_hosts_than_it_can_name_to_pdsh_by_open_mpi() -> None:
    words = shlex.split(emit(large_plan(), "deepspeed")["launch.sh"], comments=True)
    assert words[words.index("--launcher") + 1] == "openmpi"
    assert "--launcher_args=--map-by slot" in words
    assert "--include" not in words
    sparse = plan_of(*[(f"n{node:05}", device) for node in range(3000) for device in range(1, 8)])
    with pytest.raises(Unsupported, match="leaves out devices of some of 3000 nodes; DeepSpeed"):
        emit(sparse, "deepspeed")


def test_the_rendezvous_is_the_one_that_the_host_provides() -> None:
    script = emit(PLAN, "torchrun")["rendezvous.sh"]
    assert f"--rdzv-backend {BACKEND} " in script
    assert f'{PLAN_VARIABLE}="' in script
    differing = emit(plan_of(("a", 0), ("b", 1)), "torchrun")
    assert "rendezvous.sh" not in differing


def test_pdsh_is_told_to_start_all_nodes_at_once_where_they_are_many() -> None:
    many = plan_of(*[(f"n{i}", 0) for i in range(1025)])
    assert "'--launcher_args=-f 1025'" in emit(many, "deepspeed")["launch.sh"]
    assert "launcher_args" not in emit(PLAN, "deepspeed")["launch.sh"]


@pytest.mark.parametrize("target", TRAINING)
def test_plans_without_ranks_are_refused(target: str) -> None:
    with pytest.raises(BadInput, match="the placement plan has no ranks; emit a training plan"):
        emit(plan_of(), target)


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        ([("a", 0), ("b", 0), ("a", 1), ("b", 1)], "numbers ranks across nodes in turn"),
        ([("a", 0), ("a", 1), ("b", 0)], r"run \[1, 2\] ranks each; .* emit for slurm instead"),
        ([("a", 2), ("a", 3)], r"on devices \[2, 3\]; a pod gets the devices from 0"),
    ],
)
def test_what_kubernetes_cannot_number_is_refused(
    ranks: list[tuple[str, int]], sentence: str
) -> None:
    with pytest.raises(Unsupported, match=sentence):
        emit(plan_of(*ranks), "kubernetes")


def holds(order: list[str], paths: dict[str, list[str]], tier: int, size: int) -> bool:
    """Whether each run of ``size`` nodes lies in one domain of a tier, the closest being 0."""
    runs = [order[i : i + size] for i in range(0, len(order), size)]
    return all(len({tuple(paths[n][: len(paths[n]) - tier]) for n in run}) == 1 for run in runs)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=12))
def test_kueue_is_asked_for_the_longest_runs_that_the_plan_keeps(
    places: list[tuple[int, int]],
) -> None:
    order = [f"n{i}" for i in range(len(places))]
    paths = {f"n{i}": [f"p{p}", f"p{p}l{leaf}"] for i, (p, leaf) in enumerate(places)}
    asked = topology_annotations(order, paths)
    kueue = "kueue.x-k8s.io/podset-"
    whole = [tier for tier in (0, 1) if holds(order, paths, tier, len(order))]
    if whole:
        assert asked == {f"{kueue}required-topology": f"fabric.topograph.run/tier-{whole[0]}"}
        return
    assert asked[f"{kueue}preferred-topology"] == "fabric.topograph.run/tier-1"
    divisors = [size for size in range(2, len(order)) if len(order) % size == 0]
    best = next(
        (
            (tier, max(size for size in divisors if holds(order, paths, tier, size)))
            for tier in (0, 1)
            if any(holds(order, paths, tier, size) for size in divisors)
        ),
        None,
    )
    if best is None:
        assert f"{kueue}slice-size" not in asked
    else:
        assert asked[f"{kueue}slice-required-topology"] == f"fabric.topograph.run/tier-{best[0]}"
        assert asked[f"{kueue}slice-size"] == str(best[1])


def test_nothing_is_asked_of_kueue_where_nothing_is_known() -> None:
    assert topology_annotations(["a", "b"], {}) == {}
    assert topology_annotations(["a", "b"], {"a": ["x"]}) == {}
    _, jobset = yaml.safe_load_all(emit(plan_of(("a", 0), paths="?"), "kubernetes")["jobset.yaml"])
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["template"]["metadata"]["annotations"] == {}
    assert jobset["metadata"]["name"] == "training"


def test_the_targets_of_training_are_all_here() -> None:
    assert set(TRAINING) == set(EMITTERS) - {"vllm", "msccl"}
