"""Serves a dense model by vLLM in this process, with sparse prefill and too few pages for all.

Its words are the model's folder, a file of prompts, and a file to write to what was said.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

from trimtab.sparse.vllm_prefill import SparsePrefill

PAGE, PAGES, ANSWER = 64, 19, 24
ALL_BLOCKS = {"sparse": {"selector": "top", "top": 1000, "min_prompt": 64, "least_gain": 0}}


def main(folder, prompts, written):
    taken = []
    prefill = SparsePrefill.prefill

    def noted(self, work):
        taken.append([work.layer, work.keys])
        prefill(self, work)

    SparsePrefill.prefill = noted
    SparsePrefill.wants = lambda self, queries, *_: queries > 1  # whatever pays
    llm = LLM(
        folder,
        seed=0,
        dtype="float32",
        block_size=PAGE,
        max_model_len=384,
        max_num_batched_tokens=128,
        max_num_seqs=4,
        num_gpu_blocks_override=PAGES,
        kv_cache_memory_bytes=2**24,
        enable_prefix_caching=False,  # what was preempted is filled in again
        enforce_eager=True,
        disable_log_stats=False,
        skip_tokenizer_init=True,
        additional_config={"trimtab": ALL_BLOCKS},
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=ANSWER, logprobs=0, ignore_eos=True, detokenize=False
    )
    said = {}
    asked = [{"prompt_token_ids": one} for one in json.loads(Path(prompts).read_text())]
    for name, batches in (("alone", [[one] for one in asked]), ("together", [asked])):
        taken.clear()
        outputs = [x for batch in batches for x in llm.generate(batch, sampling, use_tqdm=False)]
        said[name] = {
            "answers": [list(x.outputs[0].token_ids) for x in outputs],
            "taken": list(taken),
            "preemptions": sum(
                metric.value
                for metric in llm.get_metrics()
                if metric.name == "vllm:num_preemptions"
            ),
        }
    Path(written).write_text(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:4])
