"""A small Llama trained with native sparse attention under ZeRO, beside dense attention.

The configuration's "trimtab" block switches it on, and nothing in this script; then the same model
is trained on the same text without the block. The losses of both are printed, and drawn with
--plot FILE.html.

cd examples/sparse; export DS_ACCELERATOR=cpu
trimtab launch -- deepspeed --num_gpus 2 train_native.py --deepspeed_config deepspeed.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

import deepspeed
import torch
from torch.distributed import get_backend
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 256


def model():
    """The same weights on every rank and in every run."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes, **heads))


def batch(rank, step, rows):
    """Characters of Python's manual, others for each rank and step; ids of ``[rows, CONTEXT]``."""
    text = torch.tensor([min(ord(letter), 127) for letter in topics["class"]])
    dice = torch.Generator().manual_seed(1000 * step + rank)
    starts = torch.randint(len(text) - CONTEXT, (rows,), generator=dice)
    return text[starts[:, None] + torch.arange(CONTEXT)]


def train(config, steps):
    """The mean loss of all ranks at each step."""
    net = model()
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)
    rank, losses = deepspeed.comm.get_rank(), []
    for step in range(steps):
        ids = batch(rank, step, config["train_micro_batch_size_per_gpu"])
        loss = engine(ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        shown = loss.detach().clone()
        deepspeed.comm.all_reduce(shown, deepspeed.comm.ReduceOp.AVG)
        losses.append(shown.item())
    engine.destroy()
    return losses


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--local_rank", type=int)
    arguments = deepspeed.add_config_arguments(parser).parse_args()

    torch.set_num_threads(1)
    # On a CPU DeepSpeed would compile an operator at its start that only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    config = json.loads(Path(arguments.deepspeed_config).read_text())
    runs = {}
    for one in (config, {key: value for key, value in config.items() if key != "trimtab"}):
        runs["native sparse" if "trimtab" in one else "dense"] = train(one, arguments.steps)
    if deepspeed.comm.get_rank() == 0:
        for step in range(arguments.steps):
            shown = " ".join(f"{name} {losses[step]:.5f}" for name, losses in runs.items())
            print(f"step {step}: {shown}", flush=True)
        if arguments.plot:
            plot(runs, arguments.plot)
    # Gloo's threads free the last tensors meanwhile: one that does so while Python ends aborts the
    # process, and DeepSpeed keeps the groups, so that destroying them would not join the threads.
    if get_backend() == "gloo":
        deepspeed.comm.monitored_barrier()
    deepspeed.comm.destroy_process_group()


def plot(runs, path):
    """Both losses in one picture."""
    from plotly import graph_objects

    figure = graph_objects.Figure(
        [graph_objects.Scatter(y=losses, name=name) for name, losses in runs.items()]
    )
    figure.update_layout(xaxis_title="step", yaxis_title="loss, nat a character")
    figure.write_html(path, include_plotlyjs=True)


if __name__ == "__main__":
    main()
