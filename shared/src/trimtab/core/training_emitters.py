"""Files that start a training plan: for DeepSpeed, torchrun, Slurm and Open MPI.

No command line grows with the number of nodes, of which a plan may have thousands: Linux takes
128 KiB as one argument.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from trimtab.core.deepspeed_launcher import PDSH_FAN_OUT, fits_pdsh
from trimtab.core.errors import Unsupported
from trimtab.core.plan import Plan
from trimtab.core.planned_nodes import (
    PlannedNode,
    by_node,
    require_even,
    require_ranks,
    training_nodes,
)
from trimtab.core.shell_script import shell_script

Files = dict[str, str]
"""The content of each file by its name."""

MASTER_PORT = 29500

_FOLDER = 'folder="$(cd "$(dirname "$0")" && pwd)"'

_OWN_NODE = """\
# run on every node; TRIMTAB_HOST is its name in the plan, where it has another one
own="${TRIMTAB_HOST:-$(uname -n)}" named="" alike="" times=0
while read -r rank node devices; do
    [[ $node != "$own" ]] || named="$rank $devices"
    [[ ${node%%.*} != "${own%%.*}" ]] || { alike="$rank $devices" times=$((times + 1)); }
done < "$folder/nodes"
if [[ -z $named && ($times != 1 || $own =~ ^[0-9.]+$) ]]; then
    echo "launch.sh: this machine, '$own', is not one node of the plan; set TRIMTAB_HOST." >&2
    exit 2
fi
read -r rank devices <<< "${named:-$alike}"
export CUDA_VISIBLE_DEVICES="$devices\""""


def deepspeed(plan: Plan) -> Files:
    """A hostfile in rank order, and a script that starts a training command on it.

    Where DeepSpeed cannot name so many hosts to pdsh, the script has Open MPI read the hostfile.

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
    hostfile = "".join(f"{node.name} slots={max(node.devices) + 1}\n" for node in nodes)
    words = [*_included(nodes), "--master_addr", nodes[0].name, "--master_port", str(MASTER_PORT)]
    lines = []
    if not fits_pdsh({node.name: node.devices for node in nodes}):
        if _included(nodes):
            raise Unsupported(
                f"the plan leaves out devices of some of {len(nodes)} nodes",
                fix="DeepSpeed cannot name so many to pdsh; emit for slurm or mpi instead",
            )
        lines.append("# too many hosts for pdsh; with Open MPI, ranks need mpi4py")
        words += ["--launcher", "openmpi", "--launcher_args=--map-by slot"]
    elif len(nodes) > PDSH_FAN_OUT:  # else those beyond wait for the first to end
        words += [f"--launcher_args=-f {len(nodes)}"]
    start = f'exec deepspeed --hostfile "$(dirname "$0")/hostfile" {shlex.join(words)} "$@"'
    return {"hostfile": hostfile, "launch.sh": shell_script([*lines, start])}


def _included(nodes: Sequence[PlannedNode]) -> list[str]:
    """The option that names the devices, where they are not the first ones of each node."""
    if all(_are_first(node.devices) for node in nodes):
        return []
    chosen = "@".join(f"{node.name}:{','.join(map(str, node.devices))}" for node in nodes)
    return ["--include", chosen]


def _are_first(devices: Sequence[int]) -> bool:
    return list(devices) == list(range(len(devices)))


def torchrun(plan: Plan) -> Files:
    """A script that starts the training command it is given, the same on every node.

    ``launch.sh`` looks its node up in ``nodes``, the table of each node's rank and devices, and
    refuses a machine that is not there. Where nodes are restarted or replaced, ``rendezvous.sh``
    has trimtab's rendezvous number them by the hostfile instead. ``ranks`` lists the rank, node
    and device of each process.

    Raises:
        Unsupported: torchrun cannot number ranks as the plan does.
    """
    nodes = training_nodes(plan, "torchrun")
    require_even(nodes, "torchrun", "deepspeed or slurm")
    words = ["torchrun", "--nnodes", str(len(nodes)), "--nproc-per-node"]
    words += [str(len(nodes[0].devices)), "--master-addr", nodes[0].name]
    words += ["--master-port", str(MASTER_PORT)]
    start = f'exec {shlex.join(words)} --node-rank "$rank" "$@"'
    files = {
        "hostfile": "".join(f"{node.name} slots={len(node.devices)}\n" for node in nodes),
        "ranks": "".join(
            f"{rank} {slot.node} {slot.device}\n" for rank, slot in enumerate(plan.ranks)
        ),
        "nodes": "".join(
            f"{rank} {node.name} {','.join(map(str, node.devices))}\n"
            for rank, node in enumerate(nodes)
        ),
        "launch.sh": shell_script([_FOLDER, _OWN_NODE, start]),
    }
    if len({node.devices for node in nodes}) == 1:
        files["rendezvous.sh"] = _rendezvous(nodes)
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
    return shell_script(lines)


def slurm(plan: Plan) -> Files:
    """A batch script that runs the training command it is given, each rank where the plan says.

    It is to be submitted in its folder, which all nodes must see if it has a file ``devices``.
    """
    require_ranks(plan)
    names = [node.name for node in by_node(plan.ranks)]
    devices = max(slot.device for slot in plan.ranks) + 1
    command, files = _each_rank(plan, "SLURM_PROCID", "SLURM_LOCALID")
    script = [
        "# submit it in this folder: sbatch job.sbatch COMMAND …",
        f"#SBATCH --nodes={len(names)}",
        f"#SBATCH --ntasks={len(plan.ranks)}",
        "#SBATCH --nodefile=slurm-nodes",
        f"#SBATCH --gpus-per-node={devices}",
        "#SBATCH --exclusive",
        "set -euo pipefail",
        'folder="${SLURM_SUBMIT_DIR:-.}"',
        'export SLURM_HOSTFILE="$folder/slurm-hostfile"',
        f"export MASTER_ADDR={shlex.quote(plan.ranks[0].node)} MASTER_PORT={MASTER_PORT}",
        f"export WORLD_SIZE={len(plan.ranks)}",
        f"srun --distribution=arbitrary {command}",
    ]
    return {
        "job.sbatch": shell_script(script, strict=False),
        "slurm-hostfile": "".join(f"{slot.node}\n" for slot in plan.ranks),
        "slurm-nodes": "".join(f"{name}\n" for name in names),
        **files,
    }


def mpi(plan: Plan) -> Files:
    """A rankfile, a hostfile with a line for each rank, and a script that starts a command by them.

    The script maps ranks by the hostfile's sequence, which binds no rank to a core; the rankfile is
    for those who want Open MPI to bind, and its slots are then cores. All nodes must see a file
    ``devices``, if there is one.
    """
    require_ranks(plan)
    command, files = _each_rank(plan, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    words = ["mpirun", "-np", str(len(plan.ranks)), "--map-by", "seq", "--bind-to", "none"]
    for variable in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        words += ["-x", variable]
    script = [
        _FOLDER,
        f"export MASTER_ADDR={shlex.quote(plan.ranks[0].node)} MASTER_PORT={MASTER_PORT}",
        f"export WORLD_SIZE={len(plan.ranks)}",
        f'exec {shlex.join(words)} --hostfile "$folder/hostfile" {command}',
    ]
    ranks = enumerate(plan.ranks)
    return {
        "rankfile": "".join(
            f"rank {rank}={slot.node} slot={slot.device}\n" for rank, slot in ranks
        ),
        "hostfile": "".join(f"{slot.node}\n" for slot in plan.ranks),
        "launch.sh": shell_script(script),
        **files,
    }


def _each_rank(plan: Plan, rank: str, local_rank: str) -> tuple[str, Files]:
    """The command of each rank, and the file that it reads, if any.

    The ranks of a node are numbered locally in the order of their ranks. Where that says the
    device on every node, no file is needed.

    Args:
        plan: the plan.
        rank: the launcher's variable with the rank.
        local_rank: its variable with the number of the rank on its node.
    """
    of_nodes = [node.devices for node in by_node(plan.ranks)]
    most = max(of_nodes, key=len)
    files: Files = {}
    name = "--"
    if any(devices != most[: len(devices)] for devices in of_nodes):
        files["devices"] = "".join(f"{slot.device}\n" for slot in plan.ranks)
        name = '"$folder/devices"'
        device = f'mapfile -t -s "${rank}" -n 1 device < "$0"; CUDA_VISIBLE_DEVICES=$device'
    elif _are_first(most):
        device = f"CUDA_VISIBLE_DEVICES=${local_rank}"
    else:
        numbers = " ".join(map(str, most))
        device = f"devices=({numbers}); CUDA_VISIBLE_DEVICES=${{devices[${local_rank}]}}"
    run = f'{device} RANK=${rank} LOCAL_RANK=0 exec "$@"'
    return f"bash -c '{run}' {name} \"$@\"", files
