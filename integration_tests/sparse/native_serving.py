"""Serves a model with native sparse attention by vLLM in this process, and writes what it said.

Its words are the model's folder, a file of batches of prompts, and a file to write to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

from trimtab.sparse import paged_native

ANSWER = 24


def main(folder: str, batches: str, written: str, **options) -> None:
    steps = []
    attend, entries = paged_native.PagedNative.attend, paged_native._entries

    def counted_attend(self, hidden, q, k, v, cache, plan):
        steps.append([len(q), len(plan.new.first), int(plan.new.paging.keys.sum()), 0])
        return attend(self, hidden, q, k, v, cache, plan)

    def counted_entries(compression, windows):
        steps[-1][3] += len(windows)
        return entries(compression, windows)

    paged_native.PagedNative.attend = counted_attend
    paged_native._entries = counted_entries
    engine = {
        "dtype": "float32",
        "block_size": 32,
        "max_model_len": 384,
        "max_num_batched_tokens": 96,
        "max_num_seqs": 4,
        "num_gpu_blocks_override": 24,
        "kv_cache_memory_bytes": 2**24,
        "enforce_eager": True,
        "disable_log_stats": False,
        "skip_tokenizer_init": True,
        **options,
    }
    llm = LLM(folder, seed=0, **engine)
    said = []
    for batch in json.loads(Path(batches).read_text()):
        sampling = SamplingParams(
            temperature=0,
            max_tokens=ANSWER,
            logprobs=0,
            prompt_logprobs=0 if batch["judge_prompt"] else None,
            ignore_eos=True,
            detokenize=False,
        )
        steps.clear()
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in batch["prompts"]], sampling, use_tqdm=False
        )
        said.append(
            {
                "answers": [list(one.outputs[0].token_ids) for one in outputs],
                "logprobs": [
                    [
                        step[token].logprob
                        for step, token in zip(
                            one.outputs[0].logprobs, one.outputs[0].token_ids, strict=True
                        )
                    ]
                    for one in outputs
                ],
                "prompt_logprobs": [
                    None
                    if one.prompt_logprobs is None
                    else [
                        place[token].logprob
                        for place, token in zip(
                            one.prompt_logprobs[1:], one.prompt_token_ids[1:], strict=True
                        )
                    ]
                    for one in outputs
                ],
                "cached": [one.num_cached_tokens for one in outputs],
                "preemptions": sum(
                    metric.value
                    for metric in llm.get_metrics()
                    if metric.name == "vllm:num_preemptions"
                ),
                "steps": list(steps),
            }
        )
    Path(written).write_text(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:4], **json.loads(sys.argv[4] if len(sys.argv) > 4 else "{}"))
