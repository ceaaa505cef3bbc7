"""What a server says of itself while a crowd asks it: blocks in use, preemptions, idle moments."""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx

from trimtab.branches.figures import Served

EVERY_S = 0.5
"""Rendering its metrics costs a server some milliseconds."""

_VALUE = re.compile(
    r"^vllm:(kv_cache_usage_perc|num_requests_running|num_preemptions_total)\{[^}]*\} (\S+)$",
    re.MULTILINE,
)
_BLOCKS = re.compile(r'^vllm:cache_config_info\{.*num_gpu_blocks="(\d+)"', re.MULTILINE)


@asynccontextmanager
async def watched(client: httpx.AsyncClient, url: str, served: Served) -> AsyncIterator[None]:
    """Adds to a crowd's figures what the server's ``/metrics`` say in the meantime.

    A server without them leaves these figures at 0.

    Args:
        client: asks.
        url: base URL of the server.
        served: gets ``kv_block_s``, ``busy_s`` and ``preemptions``.
    """
    before = await _read(client, url)
    task = asyncio.create_task(_sample(client, url, served))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        after = await _read(client, url)
        served.preemptions += round(after["preemptions"] - before["preemptions"])


async def _sample(client: httpx.AsyncClient, url: str, served: Served) -> None:
    since_s = time.monotonic()
    while True:
        await asyncio.sleep(EVERY_S)
        now = await _read(client, url)
        for_s, since_s = time.monotonic() - since_s, time.monotonic()
        served.kv_block_s += now["blocks_used"] * for_s
        served.busy_s += for_s if now["running"] else 0.0


async def _read(client: httpx.AsyncClient, url: str) -> dict[str, float]:
    """Blocks in use, running requests and preemptions; nothing of a server that says nothing."""
    try:
        text = (await client.get(f"{url}/metrics")).raise_for_status().text
    except httpx.HTTPError:
        text = ""
    said: defaultdict[str, float] = defaultdict(float)
    for name, value in _VALUE.findall(text):
        said[name] += float(value)
    blocks = _BLOCKS.search(text)
    return {
        "blocks_used": said["kv_cache_usage_perc"] * (int(blocks[1]) if blocks else 0),
        "running": said["num_requests_running"],
        "preemptions": said["num_preemptions_total"],
    }
