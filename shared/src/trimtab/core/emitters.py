"""Files that start what a plan says: one emitter for each tool that people run."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from trimtab.core.documents import nearest
from trimtab.core.errors import BadInput, Unsupported
from trimtab.core.kubernetes_emitter import kubernetes
from trimtab.core.msccl_emitter import msccl
from trimtab.core.plan import Group, Option, Plan, Slot
from trimtab.core.planned_nodes import (
    PlannedNode,
    by_node,
    require_even,
    require_ranks,
    training_nodes,
)

Files = dict[str, str]
"""The content of each file by its name."""

HTTP_PORT = 8000
MASTER_PORT = 29500

PDSH_FANOUT = 1024
"""How many nodes DeepSpeed has pdsh start at one time."""


def emit(plan: Plan, target: str) -> Files:
    """The files that start a plan with a tool.

    Raises:
        BadInput: no emitter has the name, the plan has nothing for it, or its tool cannot run it.
    """
    if target not in EMITTERS:
        raise BadInput(f"there is no emitter {target!r}", fix=nearest(target, EMITTERS))
    return EMITTERS[target](plan)


def vllm(plan: Plan) -> Files:
    """One script for each replica, or for each node of a replica that spans several.

    Raises:
        Unsupported: stages of a replica have different tensor parallelism.
    """
    if not plan.groups:
        raise BadInput(f"the {plan.planner} plan has no replicas", fix="emit a serving plan")
    ports: Counter[str] = Counter()
    files: Files = {}
    for group in plan.groups:
        arguments = _vllm_arguments(group)
        for replica in range(group.replicas):
            slots = group.slots[replica] if group.slots else ()
            files |= _vllm_replica(group, replica, slots, arguments, ports)
    return files


def _vllm_arguments(group: Group) -> list[str]:
    degrees = {stage.tensor_parallel for stage in group.stages}
    if len(degrees) > 1:
        raise Unsupported(
            f"the stages of group {group.name!r} have tensor parallelism {sorted(degrees)}",
            fix="vLLM needs the same in every stage",
        )
    parallel: dict[str, Option] = {
        "tensor-parallel-size": degrees.pop(),
        "pipeline-parallel-size": len(group.stages),
    }
    options = parallel | {k.replace("_", "-"): v for k, v in group.engine_args.items()}
    return [word for name, value in options.items() for word in _option(name, value)]


def _option(name: str, value: Option) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def _vllm_replica(
    group: Group,
    replica: int,
    slots: Sequence[Slot],
    arguments: Sequence[str],
    ports: Counter[str],
) -> Files:
    env = dict(group.env)
    layers = [stage.layers for stage in group.stages]
    if len(layers) > 1 and all(layers) and len(set(layers)) > 1:
        env["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, layers))
    nodes = list(by_node(slots)) or [PlannedNode("", ())]
    name = f"{group.name}-{replica}"
    port = HTTP_PORT + ports[nodes[0].name]
    ports[nodes[0].name] += 1
    files = {}
    for rank, node in enumerate(nodes):
        words = ["vllm", "serve", group.model, *arguments, "--port", str(port)]
        if len(nodes) > 1:
            words += ["--nnodes", str(len(nodes)), "--node-rank", str(rank)]
            words += ["--master-addr", nodes[0].name, "--master-port", str(MASTER_PORT + replica)]
            words += ["--distributed-executor-backend", "mp"]
            words += ["--headless"] if rank else []
        file_name = f"{name}.sh" if len(nodes) == 1 else f"{name}-node{rank}.sh"
        files[file_name] = _script(node, env, words)
    return files


def deepspeed(plan: Plan) -> Files:
    """A hostfile in rank order, and a script that starts a training command on it.

    Raises:
        Unsupported: DeepSpeed cannot number ranks as the plan does.
    """
    nodes = training_nodes(plan, "DeepSpeed")
    for node in nodes:
        if list(node.devices) != sorted(node.devices):
            raise Unsupported(
                f"the ranks of node {node.name!r} are on devices {list(node.devices)}",
                fix="DeepSpeed numbers ranks in the order of devices; emit for slurm instead",
            )
    include = "@".join(f"{node.name}:{','.join(map(str, node.devices))}" for node in nodes)
    hostfile = "".join(f"{node.name} slots={max(node.devices) + 1}\n" for node in nodes)
    words = ["--include", include, "--master_addr", nodes[0].name]
    words += ["--master_port", str(MASTER_PORT)]
    if len(nodes) > PDSH_FANOUT:  # else those beyond wait for the first to end
        words += [f"--launcher_args=-f {len(nodes)}"]
    start = f'exec deepspeed --hostfile "$(dirname "$0")/hostfile" {shlex.join(words)} "$@"'
    return {"hostfile": hostfile, "launch.sh": _shell([start])}


def torchrun(plan: Plan) -> Files:
    """Scripts that start the training command they are given, and the order of nodes and ranks.

    There is one script for each node, which states the node's rank; where nodes are restarted or
    replaced, ``rendezvous.sh`` on every node has trimtab's rendezvous number them by the hostfile.
    ``ranks`` lists the rank, node and device of each process.

    Raises:
        Unsupported: torchrun cannot number ranks as the plan does.
    """
    nodes = training_nodes(plan, "torchrun")
    require_even(nodes, "torchrun", "deepspeed or slurm")
    files = {
        "hostfile": "".join(f"{node.name} slots={len(node.devices)}\n" for node in nodes),
        "ranks": "".join(
            f"{rank} {slot.node} {slot.device}\n" for rank, slot in enumerate(plan.ranks)
        ),
    }
    if len({node.devices for node in nodes}) == 1:
        files["rendezvous.sh"] = _rendezvous(nodes)
    for rank, node in enumerate(nodes):
        words = ["torchrun", "--nnodes", str(len(nodes)), "--node-rank", str(rank)]
        words += ["--nproc-per-node", str(len(node.devices))]
        words += ["--master-addr", nodes[0].name, "--master-port", str(MASTER_PORT)]
        files[f"node{rank}-{node.name}.sh"] = _script(node, {}, words, ' "$@"')
    return files


def _rendezvous(nodes: Sequence[PlannedNode]) -> str:
    devices = nodes[0].devices
    words = ["torchrun", "--nnodes", str(len(nodes)), "--nproc-per-node", str(len(devices))]
    words += ["--rdzv-backend", "trimtab", "--rdzv-endpoint", f"{nodes[0].name}:{MASTER_PORT}"]
    words += ["--rdzv-id", "${RDZV_ID:-training}"]
    lines = [
        "# run on every node; give each job an RDZV_ID of its own",
        f"export CUDA_VISIBLE_DEVICES={','.join(map(str, devices))}",
        'TRIMTAB_PLAN="$(cd "$(dirname "$0")" && pwd)/hostfile"',
        "export TRIMTAB_PLAN",
        f'exec {shlex.join(words[:-1])} "{words[-1]}" "$@"',
    ]
    return _shell(lines)


def slurm(plan: Plan) -> Files:
    """A batch script that runs the training command it is given, each rank where the plan says."""
    require_ranks(plan)
    used = defaultdict(list)
    for slot in plan.ranks:
        used[slot.node].append(slot.device)
    names = list(used)
    devices = max(max(numbers) for numbers in used.values()) + 1
    device_of_rank = " ".join(str(slot.device) for slot in plan.ranks)
    run = 'CUDA_VISIBLE_DEVICES=${devices[$SLURM_PROCID]} RANK=$SLURM_PROCID LOCAL_RANK=0 exec "$@"'
    script = [
        f"#SBATCH --nodes={len(names)}",
        f"#SBATCH --ntasks={len(plan.ranks)}",
        f"#SBATCH --nodelist={','.join(names)}",
        f"#SBATCH --gpus-per-node={devices}",
        "#SBATCH --exclusive",
        "set -euo pipefail",
        'export SLURM_HOSTFILE="${SLURM_SUBMIT_DIR:-.}/slurm-hostfile"',
        f"export MASTER_ADDR={shlex.quote(plan.ranks[0].node)} MASTER_PORT={MASTER_PORT}",
        f"export WORLD_SIZE={len(plan.ranks)}",
        f"srun --distribution=arbitrary bash -c 'devices=({device_of_rank}); {run}' -- \"$@\"",
    ]
    hosts = "".join(f"{slot.node}\n" for slot in plan.ranks)
    return {"job.sbatch": _shell(script, strict=False), "slurm-hostfile": hosts}


def mpi(plan: Plan) -> Files:
    """A rankfile, a hostfile with a line for each rank, and a script that starts a command by them.

    The script maps ranks by the hostfile's sequence, which binds no rank to a core; the rankfile is
    for those who want Open MPI to bind, and its slots are then cores.
    """
    require_ranks(plan)
    device_of_rank = " ".join(str(slot.device) for slot in plan.ranks)
    run = (
        "CUDA_VISIBLE_DEVICES=${devices[$OMPI_COMM_WORLD_RANK]} RANK=$OMPI_COMM_WORLD_RANK"
        ' LOCAL_RANK=0 exec "$@"'
    )
    words = ["mpirun", "-np", str(len(plan.ranks)), "--map-by", "seq", "--bind-to", "none"]
    for variable in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        words += ["-x", variable]
    script = [
        f"export MASTER_ADDR={shlex.quote(plan.ranks[0].node)} MASTER_PORT={MASTER_PORT}",
        f"export WORLD_SIZE={len(plan.ranks)}",
        f'exec {shlex.join(words)} --hostfile "$(dirname "$0")/hostfile"'
        f" bash -c 'devices=({device_of_rank}); {run}' -- \"$@\"",
    ]
    ranks = enumerate(plan.ranks)
    return {
        "rankfile": "".join(
            f"rank {rank}={slot.node} slot={slot.device}\n" for rank, slot in ranks
        ),
        "hostfile": "".join(f"{slot.node}\n" for slot in plan.ranks),
        "launch.sh": _shell(script),
    }


EMITTERS: Mapping[str, Callable[[Plan], Files]] = {
    "vllm": vllm,
    "deepspeed": deepspeed,
    "torchrun": torchrun,
    "slurm": slurm,
    "kubernetes": kubernetes,
    "mpi": mpi,
    "msccl": msccl,
}


def _script(node: PlannedNode, env: Mapping[str, str], words: Sequence[str], rest: str = "") -> str:
    lines = [f"# run on node {node.name}"] if node.name else []
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, node.devices))} if node.devices else {}
    lines += [f"export {_variable(k)}={shlex.quote(v)}" for k, v in {**visible, **env}.items()]
    return _shell([*lines, f"exec {shlex.join(words)}{rest}"])


def _variable(name: str) -> str:
    """A name that a shell takes for an environment variable."""
    if not (name.isascii() and name.isidentifier()):
        raise BadInput(f"{name!r} is no environment variable", fix="use letters, digits and '_'")
    return name


def _shell(lines: Sequence[str], *, strict: bool = True) -> str:
    head = ["#!/usr/bin/env bash", *(["set -euo pipefail"] if strict else [])]
    return "\n".join([*head, *lines]) + "\n"
