"""The stat logger: which policies this engine runs with, on vLLM's own ``/metrics``."""

from __future__ import annotations

from functools import cache
from typing import Any

from prometheus_client import Gauge
from vllm.v1.metrics.loggers import StatLoggerBase

from trimtab.hosts.vllm import options


@cache
def _policy_enabled() -> Gauge:
    return Gauge(
        "trimtab_policy_enabled",
        "trimtab policies that this engine was started with.",
        ("policy", "engine"),
    )


class TrimtabStatLogger(StatLoggerBase):
    """Exports ``trimtab_policy_enabled{policy, engine}``; a step costs nothing."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        for name in options.enabled(vllm_config.additional_config):
            _policy_enabled().labels(policy=name, engine=str(engine_index)).set(1)

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to record: vLLM's own logger has the step's figures."""

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
