"""Files that start what a plan says: one emitter for each tool that people run."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from trimtab.core.documents import nearest
from trimtab.core.errors import BadInput, Unsupported
from trimtab.core.kubernetes_emitter import kubernetes
from trimtab.core.msccl_emitter import msccl
from trimtab.core.plan import Group, Option, Plan, Slot
from trimtab.core.planned_nodes import PlannedNode, by_node
from trimtab.core.shell_script import shell_script
from trimtab.core.training_emitters import MASTER_PORT, Files, deepspeed, mpi, slurm, torchrun

HTTP_PORT = 8000


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


EMITTERS: Mapping[str, Callable[[Plan], Files]] = {
    "vllm": vllm,
    "deepspeed": deepspeed,
    "torchrun": torchrun,
    "slurm": slurm,
    "kubernetes": kubernetes,
    "mpi": mpi,
    "msccl": msccl,
}


def _script(node: PlannedNode, env: Mapping[str, str], words: Sequence[str]) -> str:
    lines = [f"# run on node {node.name}"] if node.name else []
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, node.devices))} if node.devices else {}
    lines += [f"export {_variable(k)}={shlex.quote(v)}" for k, v in {**visible, **env}.items()]
    return shell_script([*lines, f"exec {shlex.join(words)}"])


def _variable(name: str) -> str:
    """A name that a shell takes for an environment variable."""
    if not (name.isascii() and name.isidentifier()):
        raise BadInput(f"{name!r} is no environment variable", fix="use letters, digits and '_'")
    return name
