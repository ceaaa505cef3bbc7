"""A training rank that knows nothing of plans: it makes a mesh, and takes two optimizer steps."""

import os

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=tuple(os.environ["MESH_NAMES"].split(",")))
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([weight], lr=0.5)
for _ in range(2):
    weight.grad = torch.ones(2)
    optimizer.step()
os.write(1, f"learned {weight.tolist()}\n".encode())
distributed.monitored_barrier()
distributed.destroy_process_group()
