"""A rank that makes DeepSpeed's pipeline grid and checks it; the first prints what lies where."""

import json
import os
import socket

import deepspeed
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipelineParallelGrid
from torch import distributed

from trimtab.placement import check_job

# Its shared-memory reduction would be compiled first.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
grid = PipelineParallelGrid(topology=PipeDataParallelTopology(num_pp=2, num_dp=2))
mine = {
    "host": socket.gethostname(),
    "pp": distributed.get_process_group_ranks(grid.get_pipe_parallel_group()),
    "dp": distributed.get_process_group_ranks(grid.get_data_parallel_group()),
}
every = [None] * distributed.get_world_size()
distributed.all_gather_object(every, mine)
found = check_job(grid)
if distributed.get_rank() == 0:
    shown = {"ranks": every, "differences": found.differences, "spreads": found.spreads}
    os.write(1, f"shown {json.dumps(shown)}\n".encode())
distributed.monitored_barrier()  # meanwhile gloo frees its tensors: at the end it would abort
distributed.destroy_process_group()
