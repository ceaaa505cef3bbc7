"""Why ranks are never permuted inside a job: what frameworks lose then, and that we refuse it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]

# Both jobs are spawned by one process, so that the framework is imported once and then forked.
MESH = """
import json, sys
import torch
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from trimtab.core.errors import BadInput
from trimtab.placement.job_check import groups_of, require_ascending

def rank_of(rank, order, folder):
    init = f"file://{folder}/store-{order[0]}"
    distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    mesh = DeviceMesh("cpu", order, mesh_dim_names=("dp",))
    at = mesh.get_coordinate()[0]
    whole = DTensor.from_local(torch.full((2,), float(at)), mesh, [Shard(0)]).full_tensor()
    try:
        require_ascending(groups_of(mesh))
        refused = ""
    except BadInput as error:
        refused = str(error)
    if rank == 0:
        print(json.dumps({"whole": whole.tolist(), "refused": refused}), flush=True)
    distributed.destroy_process_group()

for order in ([0, 1], [1, 0]):
    multiprocessing.start_processes(rank_of, (order, sys.argv[1]), 2, start_method="fork")
"""

PIPELINE = """
import json, os, sys
import torch
import deepspeed
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import distributed, multiprocessing
from trimtab.core.errors import BadInput
from trimtab.placement.job_check import groups_of, require_ascending

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

class Permuted(PipeDataParallelTopology):
    def __init__(self, order):
        super().__init__(num_pp=2, num_dp=2)
        self.mapping = {at: order[rank] for at, rank in self.mapping.items()}

def rank_of(rank, order, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="4")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # so that it looks for no MPI
    init = f"file://{folder}/store-{order[0]}"
    deepspeed.init_distributed("gloo", init_method=init, rank=rank, world_size=4)
    topology = Permuted(order)
    layers = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
    model = PipelineModule(layers, topology=topology, loss_fn=torch.nn.MSELoss())
    config = {"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine, *_ = deepspeed.initialize(
        model=model, config=config, model_parameters=model.parameters()
    )
    saved = f"{folder}/saved-{order[0]}"
    engine.save_checkpoint(saved, tag="t")
    distributed.barrier()
    try:
        require_ascending(groups_of(engine))
        refused = ""
    except BadInput as error:
        refused = str(error)
    if rank == 0:
        files = sorted(name for name in os.listdir(f"{saved}/t") if name.startswith("mp_rank"))
        print(json.dumps({"files": files, "refused": refused}), flush=True)
    distributed.barrier()
    distributed.destroy_process_group()

for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
    multiprocessing.start_processes(rank_of, (order, sys.argv[1]), 4, start_method="fork")
"""


def shown(code: str, folder: Path) -> list[dict]:
    """What the first rank printed: of ranks in ascending order, and of permuted ones."""
    script = folder / "job.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_permuted_mesh_shuffles_a_tensor_and_is_refused(tmp_path) -> None:
    ascending, permuted = shown(MESH, tmp_path)
    assert ascending == {"whole": [0.0, 0.0, 1.0, 1.0], "refused": ""}
    # If torch ever keeps the mesh's own order, the rule can be thought over.
    assert permuted["whole"] == [1.0, 1.0, 0.0, 0.0]
    assert permuted["refused"].startswith("the dp group [1, 0] is not in ascending order")


def test_a_permuted_topology_loses_a_checkpoint_file_and_is_refused(tmp_path) -> None:
    ascending, permuted = shown(PIPELINE, tmp_path)
    assert ascending["refused"] == ""
    assert permuted["refused"].startswith("the pipe group [3, 0] is not in ascending order")
    assert ascending["files"] == ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"]
    assert permuted["files"] == ["mp_rank_00_model_states.pt"]
