"""A rank that makes a mesh of its job and checks it; the first one prints what lies where."""

import json
import os
import socket

from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from trimtab.placement import check_job

distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
hosts = [None] * distributed.get_world_size()
distributed.all_gather_object(hosts, socket.gethostname())
groups = {name: distributed.get_process_group_ranks(mesh.get_group(name)) for name in ("pp", "dp")}
every = [None] * distributed.get_world_size()
distributed.all_gather_object(every, groups)
found = check_job(mesh)
if distributed.get_rank() == 0:
    shown = {
        "hosts": hosts,
        "groups": every,
        "differences": found.differences,
        "spreads": found.spreads,
        "plan": os.path.basename(os.environ["TRIMTAB_PLAN"]),
    }
    os.write(1, f"shown {json.dumps(shown)}\n".encode())
distributed.monitored_barrier()  # meanwhile gloo frees its tensors: at the end it would abort
distributed.destroy_process_group()
