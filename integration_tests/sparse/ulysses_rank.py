"""One of two ranks that share sequences; fails where they differ from one process alone."""

from __future__ import annotations

import copy

import torch
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.core.errors import BadInput
from trimtab.sparse.config import NativeConfig
from trimtab.sparse.native import use_native_attention
from trimtab.sparse.nsa import NSAAttention

TOKENS = 80
CONFIG = NativeConfig(window=8, stride=4, block=16, top=3, first=1, recent=1, sliding=24)


def summed(module):
    """The gradients of both ranks together."""
    for parameter in module.parameters():
        dist.all_reduce(parameter.grad)
    return [parameter.grad for parameter in module.parameters()]


def module_agrees(own, gate, compress, kv_per_branch):
    torch.manual_seed(0)
    sizes = {"gate": gate, "compress": compress, "kv_per_branch": kv_per_branch}
    alone = NSAAttention(20, 6, 2, 8, 12, **sizes).double()
    shared = copy.deepcopy(alone)
    shared.share_sequences(dist.group.WORLD)
    hidden, above = torch.randn(2, 2, TOKENS, 20, dtype=torch.float64)
    angle = torch.randn(1, TOKENS, 4, dtype=torch.float64).repeat(1, 1, 2)
    out = alone(hidden, (angle.cos(), angle.sin()))
    (out * above).sum().backward()
    part = shared(hidden[:, own], (angle[:, own].cos(), angle[:, own].sin()))
    (part * above[:, own]).sum().backward()
    torch.testing.assert_close(part, out[:, own])
    torch.testing.assert_close(summed(shared), [p.grad for p in alone.parameters()])


def model_agrees(own):
    alone = llama().double()
    shared = copy.deepcopy(alone)
    use_native_attention(alone, CONFIG)
    use_native_attention(shared, CONFIG, dist.group.WORLD)
    shared.load_state_dict(alone.state_dict())
    ids, place = torch.randint(50, (2, TOKENS)), torch.arange(TOKENS)[None]
    dist.broadcast(ids, 0)
    whole = alone(ids).logits
    whole.square().sum().backward()
    part = shared(ids[:, own], position_ids=place[:, own]).logits
    part.square().sum().backward()
    torch.testing.assert_close(part, whole[:, own])
    torch.testing.assert_close(summed(shared), [p.grad for p in alone.parameters()])


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 50, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def refuses():
    try:
        NSAAttention(20, 3, 3, 8).share_sequences(dist.group.WORLD)
    except BadInput as error:
        return "3 KV heads" in str(error)
    return False


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    half = TOKENS // dist.get_world_size()
    own = slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)
    module_agrees(own, "token", "linear", True)
    module_agrees(own, "head", "mlp", False)
    model_agrees(own)
    assert refuses()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
