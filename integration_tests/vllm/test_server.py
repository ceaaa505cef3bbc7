"""A real server with the host: fields at its door, a policy that fails, its routes and metrics."""

from __future__ import annotations

import json
import textwrap
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import BadRequestError, OpenAI

from trimtab.hosts.vllm.server import SMALL_CPU_ENGINE, Server, small_cpu_environment
from trimtab.hosts.vllm.small_model import small_model

pytestmark = pytest.mark.integration

FAULTY = """
    from pydantic import BaseModel
    from trimtab.core.hooks import PluginInfo, hookimpl
    from trimtab.core.policy import ServingPolicy

    class Nothing(BaseModel):
        pass

    class FailsAtTheThird(ServingPolicy):
        asked = 0

        def key(self, call, now_s):
            self.asked += 1
            if self.asked >= 3:
                raise RuntimeError("broken on purpose")
            return 0.0

    @hookimpl
    def trimtab_info():
        return PluginInfo("fails", "test only", Nothing)

    @hookimpl
    def trimtab_serving_policy(config):
        return FailsAtTheThird()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server with urgency and a faulty policy behind it."""
    site = tmp_path_factory.mktemp("site")
    (site / "faulty_policy.py").write_text(textwrap.dedent(FAULTY))
    metadata = site / "faulty_policy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-policy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[trimtab.plugins]\nfaulty = faulty_policy\n")
    log = tmp_path_factory.mktemp("log") / "server.log"
    plugins = {"trimtab": {"faulty": {}, "urgency": {}}}
    arguments = [
        *SMALL_CPU_ENGINE,
        *("--max-num-seqs", "2"),
        *("--scheduler-cls", "trimtab.hosts.vllm.Scheduler"),
        *("--additional-config", json.dumps(plugins)),
    ]
    environment = {**small_cpu_environment(), "PYTHONPATH": str(site)}
    with Server(small_model(), log, arguments, environment) as running:
        yield running.wait_ready()


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client, xargs=None, headers=None, tokens=4):
    return client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": "Say yes."}],
        max_tokens=tokens,
        temperature=0,
        extra_body={"vllm_xargs": xargs} if xargs else None,
        extra_headers=headers,
    )


def test_a_failing_policy_loses_no_request_and_is_logged_once(server, client):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(client, tokens=16), range(16)))
    assert all(answer.choices[0].message.content for answer in answers)
    log = server.log.read_text()
    assert log.count("The policy of the plugin 'faulty' is switched off") == 1
    assert "'urgency' is switched off" not in log


def test_a_wrong_type_is_400_and_names_the_field(client):
    with pytest.raises(BadRequestError, match=r"trimtab\.deadline_s"):
        ask(client, {"trimtab.deadline_s": "soon"})


def test_a_wrong_header_is_400_and_names_it(client):
    with pytest.raises(BadRequestError, match="X-Workflow-Deadline-Ms"):
        ask(client, headers={"X-Workflow-Deadline-Ms": "-3"})


def test_an_unknown_key_is_ignored_with_one_warning(server, client):
    for _ in range(3):
        assert ask(client, {"trimtab.dedline_s": 3}).choices
    log = server.log.read_text()
    assert log.count("unknown vllm_xargs key trimtab.dedline_s") == 1


def test_fields_and_headers_are_taken(client):
    fields = {"trimtab.workflow": "w1", "trimtab.stage": "sql", "trimtab.deadline_s": 30}
    assert ask(client, fields).choices
    assert ask(client, headers={"X-Workflow-ID": "w1", "X-Workflow-Stage": "fix"}).choices


def test_streaming_passes(client):
    chunks = client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": "Count."}],
        max_tokens=8,
        stream=True,
        extra_body={"vllm_xargs": {"trimtab.workflow": "w2"}},
    )
    assert sum(bool(chunk.choices) for chunk in chunks) >= 2


def test_the_status_route_says_what_is_on(server):
    status = httpx.get(f"{server.url}/trimtab/status").json()
    assert status["plugins"]["urgency"] == {"enabled": True, "options": {}}
    assert status["scheduler_cls"] == "trimtab.hosts.vllm.Scheduler"


def test_the_metrics_name_the_policies(server):
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'trimtab_policy_enabled{engine="0",policy="urgency"} 1.0' in metrics
