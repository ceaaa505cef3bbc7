"""A rank of DeepSpeed's pipeline engine that knows nothing of plans and trains one batch."""

import os

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from torch import distributed

# Its shared-memory reduction would be compiled first.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
model = PipelineModule(
    layers=[torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)],
    num_stages=2,
    loss_fn=torch.nn.functional.mse_loss,
)
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
    config={"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1},
)
engine.train_batch(iter([(torch.ones(1, 2), torch.zeros(1, 2))]))
os.write(1, b"learned\n")
distributed.destroy_process_group()
