"""Ranks that share sequences or train by ZeRO; fails where they differ from one alone.

Its word is a folder to write to. Ranks are forked off one process, which has imported everything.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from argparse import Namespace
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from torch import distributed as dist
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.core.errors import BadInput
from trimtab.core.hooks import discover
from trimtab.sparse.config import NativeConfig
from trimtab.sparse.native import NativeAttention, use_native_attention
from trimtab.sparse.nsa import NSAAttention

TOKENS = 80
CONFIG = NativeConfig(window=8, stride=4, block=16, top=3, first=1, recent=1, sliding=24)
STEPS, ROWS = 4, 2
LEARNING = {"lr": 1e-2, "weight_decay": 0.1}


def part(rank, ranks):
    """The tokens of a rank that shares its sequences."""
    return slice(rank * TOKENS // ranks, (rank + 1) * TOKENS // ranks)


def summed(module):
    """The gradients of all ranks together."""
    for parameter in module.parameters():
        dist.all_reduce(parameter.grad)
    return [parameter.grad for parameter in module.parameters()]


def module_agrees(gate, compress, kv_per_branch):
    torch.manual_seed(0)
    ranks = dist.get_world_size()
    own = part(dist.get_rank(), ranks)
    sizes = {"gate": gate, "compress": compress, "kv_per_branch": kv_per_branch}
    alone = NSAAttention(20, 3 * ranks, ranks, 8, 12, **sizes).double()
    shared = copy.deepcopy(alone)
    shared.share_sequences(dist.group.WORLD)
    hidden, above = torch.randn(2, 2, TOKENS, 20, dtype=torch.float64)
    angle = torch.randn(1, TOKENS, 4, dtype=torch.float64).repeat(1, 1, 2)
    out = alone(hidden, (angle.cos(), angle.sin()))
    (out * above).sum().backward()
    mine = shared(hidden[:, own], (angle[:, own].cos(), angle[:, own].sin()))
    (mine * above[:, own]).sum().backward()
    torch.testing.assert_close(mine, out[:, own])
    torch.testing.assert_close(summed(shared), [p.grad for p in alone.parameters()])


def model_agrees():
    own = part(dist.get_rank(), dist.get_world_size())
    alone = llama().double()
    shared = copy.deepcopy(alone)
    use_native_attention(alone, CONFIG)
    use_native_attention(shared, CONFIG, dist.group.WORLD)
    shared.load_state_dict(alone.state_dict())
    ids, place = torch.randint(50, (2, TOKENS)), torch.arange(TOKENS)[None]
    dist.broadcast(ids, 0)
    whole = alone(ids).logits
    whole.square().sum().backward()
    mine = shared(ids[:, own], position_ids=place[:, own]).logits
    mine.square().sum().backward()
    torch.testing.assert_close(mine, whole[:, own])
    torch.testing.assert_close(summed(shared), [p.grad for p in alone.parameters()])


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 50, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4))


def refuses():
    try:
        NSAAttention(20, 3, 3, 8).share_sequences(dist.group.WORLD)
    except BadInput as error:
        return "3 KV heads" in str(error)
    return False


def batch(step):
    """Ids of ``[ranks, rows, tokens + 1]``, the same on all ranks; there are two to learn."""
    dice = torch.Generator().manual_seed(step % 2)
    return torch.randint(50, (dist.get_world_size(), ROWS, TOKENS + 1), generator=dice)


def loss(model, ids, own=slice(TOKENS)):
    """The sum over the tokens ``own``."""
    place = torch.arange(TOKENS)[None, own]
    logits = model(ids[:, :-1][:, own], position_ids=place, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:][:, own].flatten(), reduction="sum")


def alone_losses():
    """Of one process with plain torch."""
    net = llama()
    torch.manual_seed(1)
    use_native_attention(net, CONFIG.model_copy(update={"kv_per_branch": True}))
    optimizer = torch.optim.AdamW(net.parameters(), **LEARNING)
    losses = []
    for step in range(STEPS):
        ids = batch(step).flatten(0, 1)
        mean = loss(net, ids) / (len(ids) * TOKENS)
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(mean.item())
    return losses


def configuration(stage):
    native = {**CONFIG.model_dump(), "kv_per_branch": True}
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "optimizer": {"type": "AdamW", "params": {**LEARNING, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 1.0,
        "trimtab": {"sparse": {"native": native}},
    }


def zero_losses(net, sharers=1, times=1, **given):
    """Of all ranks' engine, which makes the model sparse if the configuration says so.

    So many ranks share sequences; they give their part of the loss ``times`` what DeepSpeed wants
    to hear.
    """
    torch.manual_seed(1 + dist.get_rank())  # only the first rank's new parameters count
    engine, *_ = deepspeed.initialize(model=net, **given)
    layers = [layer for layer in net.modules() if isinstance(layer, NativeAttention)]
    groups = dist.get_world_size() // sharers
    number, place = divmod(dist.get_rank(), sharers)
    losses = []
    for step in range(STEPS):
        ids = batch(step).unflatten(0, (groups, sharers))[number].flatten(0, 1)
        mean = loss(engine, ids, part(place, sharers)) / (len(ids) * TOKENS)
        engine.backward(times * mean)
        engine.step()
        shown = mean.detach() / groups
        dist.all_reduce(shown)
        losses.append(shown.item())
    engine.destroy()
    return len(layers), losses


def under_zero_init():
    """The model with its weights spread over the ranks from the first."""
    weights = llama().state_dict()
    with deepspeed.zero.Init(config_dict_or_path=configuration(3)):
        net = llama()
    for name, parameter in net.named_parameters():
        assert parameter.numel() == 0
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            parameter.data.copy_(weights[name])
    return net


def tell(runs):
    if dist.get_rank() == 0:
        for name, (layers, losses) in runs.items():
            print(f"losses, {dist.get_world_size()} ranks, {name}: {layers}", *losses, flush=True)


def two_ranks(folder):
    """By every stage, and however the configuration, the parameters or the optimizer are given."""
    module_agrees("token", "linear", True)
    module_agrees("head", "mlp", False)
    model_agrees()
    assert refuses()
    all_refused()
    path = folder / f"{dist.get_rank()}.json"
    path.write_text(json.dumps(configuration(2)))
    runs = {"alone": (2, alone_losses())}
    for stage in (0, 1):
        net = llama()
        runs[f"ZeRO {stage}"] = zero_losses(
            net, config=configuration(stage), model_parameters=net.parameters()
        )
    net = llama()
    runs["ZeRO 2"] = zero_losses(net, config=str(path), model_parameters=list(net.parameters()))
    bare = {key: value for key, value in configuration(3).items() if key != "optimizer"}
    path.write_text(json.dumps(bare))
    net = llama()
    runs["ZeRO 3"] = zero_losses(
        net,
        args=Namespace(deepspeed_config=str(path), local_rank=dist.get_rank()),
        optimizer=torch.optim.AdamW(net.parameters(), **LEARNING),
    )
    runs["zero.Init"] = zero_losses(under_zero_init(), config_params=configuration(3))
    tell(runs | sharing(2, (2, 3)))


def four_ranks(_):
    """All share each sequence; then pairs do, each with rows of its own."""
    module_agrees("head", "linear", True)
    model_agrees()
    assert refuses()
    runs = {"alone": (2, alone_losses())} | sharing(4, (1,))
    parallel_state_sp._release_sequence_parallel_groups()
    tell(runs | sharing(2, (2,)))


def sharing(sharers, stages):
    """Runs of ranks that share sequences; ZeRO 3 averages over these too."""
    parallel_state_sp.initialize_sequence_parallel(sharers)
    return {
        f"ZeRO {stage}, shared by {sharers}": zero_losses(
            llama(),
            sharers,
            sharers if stage == 3 else 1,
            config=configuration(stage),
            mpu=parallel_state_sp,
        )
        for stage in stages
    }


def refusal(model, config):
    try:
        deepspeed.initialize(model=model, config=config)
    except BadInput as error:
        return str(error)
    return ""


def all_refused():
    place = "the DeepSpeed configuration, trimtab.sparse"
    config = configuration(0)
    assert refusal(torch.nn.Linear(2, 2), config).startswith(
        f"{place}: Linear has no attention layer with q_proj, k_proj, v_proj, o_proj; give a"
        " transformers model with the attention of Llama, Mistral or Qwen2"
    )
    wrong = {**config, "trimtab": {"sparse": {"native": {"top": 0}}}}
    assert refusal(llama(), wrong).startswith(f"{place}: native.top is 0")
    mesh = {**config, "sequence_parallel_size": 2, "data_parallel_size": 1}
    assert "DeepSpeed sums no gradients between ranks" in refusal(llama(), mesh)


def rank_of(job, rank, ranks, folder):
    """One rank from its beginning to its end."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{job.__name__}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=100),
    )
    deepspeed.init_distributed()
    job(folder)
    dist.barrier()
    dist.destroy_process_group()


def main():
    torch.set_num_threads(1)
    # Its shared-memory reduction would be compiled first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    discover()  # imports the plugins, which each rank would do
    folder, forks = Path(sys.argv[1]).resolve(), get_context("fork")
    for job, ranks in ((two_ranks, 2), (four_ranks, 4)):
        running = [
            forks.Process(target=rank_of, args=(job, rank, ranks, folder), daemon=True)
            for rank in range(ranks)
        ]
        for process in running:
            process.start()
        while running:
            connection.wait([process.sentinel for process in running])
            if any(process.exitcode for process in running):
                sys.exit(f"a rank of {job.__name__} has failed")  # the others are ended with this
            running = [process for process in running if process.exitcode is None]


if __name__ == "__main__":
    main()
