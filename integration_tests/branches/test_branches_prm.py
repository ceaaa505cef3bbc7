"""The reward model's scorer against a real pooling server with a tiny model of random weights."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2Model

from trimtab.branches.config import PrmOptions
from trimtab.branches.prm import PrmScorer
from trimtab.hosts.vllm.server import SMALL_CPU_ENGINE, Server, small_cpu_environment
from trimtab.hosts.vllm.small_model import small_model

pytestmark = [pytest.mark.integration, pytest.mark.slow]

WITHIN_S = 120
TAG = "<extra_0>"
WIDTH = 64


@dataclass
class RewardModel:
    """A process-reward model as transformers computes it, and its folder."""

    folder: Path
    tokenizer: Any
    body: Any
    head: torch.nn.Sequential

    def score(self, ids: list[int]) -> float:
        """How good the last step of tagged tokens is."""
        with torch.inference_mode():
            hidden = self.body(torch.tensor([ids])).last_hidden_state[0]
            rows = self.head(hidden).softmax(-1)
        tag = self.tokenizer.convert_tokens_to_ids(TAG)
        return float(rows[[at for at, token in enumerate(ids) if token == tag][-1], 1])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> RewardModel:
    folder = tmp_path_factory.mktemp("prm")
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    tokenizer.add_special_tokens({"additional_special_tokens": [TAG]})
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        architectures=["Qwen2ForProcessRewardModel"],
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        dtype="float32",
    )
    config.save_pretrained(folder)
    torch.manual_seed(0)
    body = Qwen2Model(config).float().eval()
    head = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 2)
    )
    parts = {"model": body, "score": head}
    weights = {
        f"{part}.{name}": value.contiguous()
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return RewardModel(folder, tokenizer, body, head)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    tag = {"step_tag_id": model.tokenizer.convert_tokens_to_ids(TAG)}
    arguments = [
        *SMALL_CPU_ENGINE,
        *("--max-model-len", "512"),
        *("--runner", "pooling"),
        *("--dtype", "float32"),
        *("--pooler-config", json.dumps(tag)),
    ]
    with Server(model.folder, log, arguments, small_cpu_environment()) as running:
        yield running.wait_ready()


@pytest.fixture
def scorer(model, server) -> Iterator[PrmScorer]:
    options = PrmOptions(url=server.url, model="model", context_tokens=256, timeout_s=60)
    scorer = PrmScorer(options, model.tokenizer.decode)
    yield scorer
    scorer.close()


def scores(scorer: PrmScorer, wanted: int) -> dict[str, tuple[int, float]]:
    found: dict[str, tuple[int, float]] = {}
    give_up_s = time.monotonic() + WITHIN_S
    while len(found) < wanted:
        assert not scorer.counts.failed
        assert time.monotonic() < give_up_s
        found |= {key: (at, value) for key, at, value in scorer.take()}
        time.sleep(0.02)
    return found


def test_scores_are_those_of_the_model(model, scorer) -> None:
    prompt = "What is 3 + 4 + 5?\n"
    branches = {
        "one": ["First 3 + 4 = 7."],
        "two": ["First 3 + 4 = 7.", "Then 7 + 5 = 12."],
        "wrong": ["First 3 + 4 = 8.", "Then 8 + 5"],
    }
    for key, steps in branches.items():
        scorer.submit(
            key, model.tokenizer.encode(prompt), model.tokenizer.encode("\n\n".join(steps))
        )
    found = scores(scorer, len(branches))
    for key, steps in branches.items():
        text = prompt + "".join(step + TAG for step in steps)
        at, value = found[key]
        assert at == len(model.tokenizer.encode("\n\n".join(steps)))
        assert value == pytest.approx(model.score(model.tokenizer.encode(text)), abs=1e-4)
    values = {round(value, 5) for _, value in found.values()}
    assert len(values) == len(branches), "the model does not tell the texts apart"


def test_a_branch_longer_than_the_context_is_scored_by_its_end(model, scorer) -> None:
    tokenizer = model.tokenizer
    output = tokenizer.encode("\n\n".join(f"Step {n}: add {n}." for n in range(400)))
    scorer.submit("long", tokenizer.encode("Add these."), output)
    at, value = scores(scorer, 1)["long"]
    assert at == len(output) > 512
    assert 0 < value < 1
