"""What the pages list is what the code has."""

from __future__ import annotations

from pathlib import Path

from trimtab.core.hooks import plugin
from trimtab.hosts.vllm import contract

DOCS = Path(__file__).parent


def test_the_vllm_page_lists_the_whole_contract() -> None:
    page = (DOCS / "vllm-host.md").read_text()
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `vllm.")}
    for symbol in contract.METHODS:
        module, _, qualified = symbol.partition(":")
        assert f"{qualified.split('.')[-1]}`" in rows[module], symbol
    for attribute in contract.SCHEDULER_ATTRIBUTES:
        assert f"`{attribute}`" in rows["vllm.v1.core.sched.scheduler"]


def test_the_urgency_page_lists_every_field_and_order() -> None:
    page = (DOCS / "urgency.md").read_text()
    info = plugin("urgency").info
    for name, field in info.call_fields.items():
        assert f"`trimtab.{name}`" in page
        assert f"`{field.header}`" in page
    assert info.config is not None
    orders = info.config.model_json_schema()["properties"]["order"]["enum"]
    assert [order for order in orders if f"| `{order}`" not in page] == []
