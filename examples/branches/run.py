"""Sums that a small model gets right now and then, answered by the vote of several branches.

python examples/branches/run.py --questions 5
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from sums import Sum, sums

from trimtab.branches.extract import normalised
from trimtab.hosts.vllm.server import SMALL_CPU_ENGINE, Server, small_cpu_environment
from trimtab.hosts.vllm.small_model import small_model

PLUGIN = (
    *("--scheduler-cls", "trimtab.hosts.vllm.Scheduler"),
    *("--middleware", "trimtab.branches.Middleware"),
    *("--additional-config", '{"trimtab": {"branches": {"score_every": 8}}}'),
)


@contextmanager
def served() -> Iterator[str]:
    """The address of a server of the small model, with the plugin."""
    arguments = [*SMALL_CPU_ENGINE, "--max-num-seqs", "16", *PLUGIN]
    with tempfile.TemporaryDirectory(prefix="branches-") as folder:
        log = Path(folder) / "server.log"
        with Server(small_model(), log, arguments, small_cpu_environment()) as server:
            yield server.wait_ready().url


class Asker:
    """Asks sums, and counts what they cost."""

    def __init__(self, client: openai.OpenAI, branches: int, enough: int) -> None:
        self._client = client
        self._fields = {
            "trimtab.branches": branches,
            "trimtab.enough": enough,
            "trimtab.answer": "majority",
            "trimtab.extract": "final",
            "trimtab.show": "all",
        }
        self.right = 0
        self.tokens = 0
        self.answer_tokens = 0
        self.fates: Counter[str] = Counter()

    def ask(self, task: Sum) -> None:
        """Asks one sum, and shows its branches."""
        response = self._client.chat.completions.create(
            model="model",
            messages=task.messages,
            max_tokens=120,
            temperature=0.6,
            top_p=0.95,
            extra_body={"vllm_xargs": self._fields},
        )
        told = [(choice.model_extra or {})["trimtab"] for choice in response.choices]
        summary = (response.model_extra or {})["trimtab"]
        self.right += normalised(told[0].get("answer", "")) == task.answer
        self.tokens += response.usage.completion_tokens if response.usage else 0
        self.answer_tokens += summary["answer_tokens"]
        self.fates.update(summary["fates"])
        print(f"{task.question}   right: {task.answer}", file=sys.stderr)
        for one in told:
            print(line(one, winner=one is told[0]), file=sys.stderr)


def line(told: dict[str, Any], winner: bool) -> str:
    """What became of a branch."""
    score = " none" if told["score"] is None else f"{told['score']:5.2f}"
    said = f"  answer {told['answer']}" if "answer" in told else ""
    mark = "*" if winner else " "
    return (
        f"  {mark} branch {told['branch']}  {told['fate']:<9} score {score}  "
        f"{told['tokens']:>4} tokens{said}"
    )


def main() -> None:
    """Starts the server unless the address of one is given, and asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of a server that runs already, model name: model")
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--branches", type=int, default=8)
    parser.add_argument("--enough", type=int, default=4)
    options = parser.parse_args()

    def asked(url: str) -> Asker:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as client:
            asker = Asker(client, options.branches, options.enough)
            for task in sums(options.questions, seed=1):
                asker.ask(task)
        return asker

    if options.url:
        asker = asked(options.url)
    else:
        with served() as url:
            asker = asked(url)
    figures = {
        "questions": options.questions,
        "right": asker.right,
        "tokens": asker.tokens,
        "answer_tokens": asker.answer_tokens,
        "fates": dict(asker.fates),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
