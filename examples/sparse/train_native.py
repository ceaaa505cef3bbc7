"""A small Llama trained with native sparse attention by ZeRO and Ulysses, beside dense attention.

The configuration's "trimtab" block switches it on, and nothing in this script. The same model is
trained on the same text three times: by ZeRO, each rank with rows of its own; by Ulysses, two ranks
with halves of the rows of both; and without the block. The losses are printed, and drawn in one
picture with --plot FILE.html.

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
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from torch.distributed import get_backend
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 256
SHARERS = 2


def model():
    """The same weights on every rank and in every run."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes, **heads))


def batch(rank, step, rows):
    """Characters of Python's manual, others for each rank and step; ``[rows, CONTEXT + 1]``."""
    text = torch.tensor([min(ord(letter), 127) for letter in topics["class"]])
    dice = torch.Generator().manual_seed(1000 * step + rank)
    starts = torch.randint(len(text) - CONTEXT - 1, (rows,), generator=dice)
    return text[starts[:, None] + torch.arange(CONTEXT + 1)]


def loss_of(engine, rows, own):
    """What a rank's tokens ``own`` add to the mean over all tokens of the rows."""
    place = torch.arange(CONTEXT)[None, own]
    logits = engine(rows[:, :-1][:, own], position_ids=place, use_cache=False).logits
    told = rows[:, 1:][:, own].flatten()
    return cross_entropy(logits.flatten(0, 1), told, reduction="sum") / rows[:, 1:].numel()


def train(config, steps, sharers=1):
    """The mean loss at each step; so many ranks share the rows of all of them (Ulysses)."""
    net = model()
    engine, *_ = deepspeed.initialize(
        model=net,
        model_parameters=net.parameters(),
        config=config,
        mpu=parallel_state_sp if sharers > 1 else None,
    )
    rank, losses = deepspeed.comm.get_rank(), []
    first, size = rank // sharers * sharers, CONTEXT // sharers
    own = slice((rank - first) * size, (rank - first + 1) * size)
    # ZeRO 3 averages over the ranks that share, where the other stages add up.
    times = sharers if config["zero_optimization"]["stage"] == 3 else 1
    for step in range(steps):
        count = config["train_micro_batch_size_per_gpu"]
        rows = torch.cat([batch(one, step, count) for one in range(first, first + sharers)])
        loss = loss_of(engine, rows, own)
        engine.backward(times * loss)
        engine.step()
        shown = loss.detach() * sharers
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
    runs = {"native sparse": train(config, arguments.steps)}
    if deepspeed.comm.get_world_size() % SHARERS == 0:
        parallel_state_sp.initialize_sequence_parallel(SHARERS)
        runs["native sparse, sequences shared"] = train(config, arguments.steps, SHARERS)
    config.pop("trimtab")
    runs["dense"] = train(config, arguments.steps)
    if deepspeed.comm.get_rank() == 0:
        for step in range(arguments.steps):
            shown = "; ".join(f"{name} {losses[step]:.5f}" for name, losses in runs.items())
            print(f"step {step}: {shown}", flush=True)
        if arguments.plot:
            plot(runs, arguments.plot)
    # Gloo's threads free the last tensors meanwhile: one that does so while Python ends aborts the
    # process, and DeepSpeed keeps the groups, so that destroying them would not join the threads.
    if get_backend() == "gloo":
        deepspeed.comm.monitored_barrier()
    deepspeed.comm.destroy_process_group()


def plot(runs, path):
    """All losses in one picture."""
    from plotly import graph_objects

    figure = graph_objects.Figure(
        [graph_objects.Scatter(y=losses, name=name) for name, losses in runs.items()]
    )
    figure.update_layout(xaxis_title="step", yaxis_title="loss, nat a character")
    figure.write_html(path, include_plotlyjs=True)


if __name__ == "__main__":
    main()
