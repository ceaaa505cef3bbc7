"""Questions to vLLM's pool of KV blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


def blocks_short(scheduler: Scheduler) -> int:
    """How many blocks the running requests need for the next step beyond those that are free.

    0 for a model with several groups of KV layers, whose needs only vLLM itself can tell.
    """
    groups = scheduler.kv_cache_config.kv_cache_groups
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    # A request that decodes takes one block at most, unless it drafts many tokens at once.
    if len(groups) != 1 or free >= len(scheduler.running) * (1 + scheduler.num_spec_tokens):
        return 0
    size = groups[0].kv_cache_spec.block_size
    # A request holds at least the blocks of what is computed of it; asking copies their list.
    if sum(_at_most(scheduler, request, size) for request in scheduler.running) <= free:
        return 0
    needed = sum(_more_blocks(scheduler, request, size) for request in scheduler.running)
    return max(needed - free, 0)


def private_blocks(scheduler: Scheduler, request_id: str) -> set[int]:
    """The blocks that a request shares with no other one."""
    manager = scheduler.kv_cache_manager
    blocks = manager.block_pool.blocks
    held = manager.get_block_ids(request_id)
    return {number for group in held for number in group if blocks[number].ref_cnt == 1}


def _at_most(scheduler: Scheduler, request: Request, size: int) -> int:
    """The blocks that the next step adds to those of what is computed of a request."""
    computed = request.num_computed_tokens
    return -(-_next_tokens(scheduler, request) // size) - -(-computed // size)


def _more_blocks(scheduler: Scheduler, request: Request, size: int) -> int:
    """The blocks that a request lacks for what the next step computes of it."""
    held = len(scheduler.kv_cache_manager.get_block_ids(request.request_id)[0])
    return max(-(-_next_tokens(scheduler, request) // size) - held, 0)


def _next_tokens(scheduler: Scheduler, request: Request) -> int:
    """How much of a request is computed after the next step."""
    most: int = request.num_computed_tokens + scheduler.max_num_scheduled_tokens
    return min(request.num_tokens_with_spec + request.num_output_placeholders, most)
