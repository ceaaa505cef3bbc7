"""vLLM's own parser accepts what the vllm emitter writes."""

from __future__ import annotations

import shlex

import pytest

from trimtab.core.emitters import emit
from trimtab.core.plan import Group, Objective, Plan, Slot, Stage

pytestmark = pytest.mark.integration


def test_vllm_parses_the_emitted_command_lines() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    stage = Stage(device="H100-SXM", tensor_parallel=2)
    spread = Group(
        name="spread",
        model="meta-llama/Llama-3.1-70B-Instruct",
        stages=(stage, stage),
        slots=(tuple(Slot(node=f"n{i // 2}", device=i % 2) for i in range(4)),),
        engine_args={"max_num_seqs": 64, "enable_prefix_caching": False, "kv_cache_dtype": "fp8"},
    )
    plan = Plan(
        planner="fleet",
        objective=Objective(metric="rate", unit="req/s", better="higher", value=1.0),
        groups=(spread,),
    )
    parser = make_arg_parser(FlexibleArgumentParser())
    for rank, text in enumerate(emit(plan, "vllm").values()):
        words = shlex.split(text.splitlines()[-1])
        assert words[:3] == ["exec", "vllm", "serve"]
        arguments = parser.parse_args(words[3:])
        assert arguments.model_tag == "meta-llama/Llama-3.1-70B-Instruct"
        assert arguments.tensor_parallel_size == arguments.pipeline_parallel_size == 2
        assert (arguments.nnodes, arguments.node_rank, arguments.master_addr) == (2, rank, "n0")
        assert arguments.headless == bool(rank)
        assert arguments.enable_prefix_caching is False
        assert arguments.max_num_seqs == 64
