"""trimtab's own distributions and plugins: installed once each, and importable."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import EntryPoint, distributions, entry_points

from trimtab.cli.checks.finding import Finding, error, ok
from trimtab.cli.checks.installations import Installation, installations, installed
from trimtab.cli.checks.other_process import CallFailed, call
from trimtab.core.hooks import GROUP, load

CHECK = "plugins"


def twice() -> list[Finding]:
    """Distributions that are installed twice, and plugins that two distributions bring."""
    return [*_distributions_twice(), *_plugins_twice()]


def _distributions_twice() -> list[Finding]:
    by_name: dict[str, list[Installation]] = defaultdict(list)
    for installation in installed("trimtab"):
        by_name[installation.name].append(installation)
    return [
        error(
            CHECK,
            f"{name} is installed twice: {_listed(where)}",
            f"pip uninstall {name}, until pip finds none, then install it again",
        )
        for name, where in by_name.items()
        if len(where) > 1
    ]


def _plugins_twice() -> list[Finding]:
    by_plugin: dict[str, list[Installation]] = defaultdict(list)
    for distribution in distributions():
        for entry_point in distribution.entry_points:
            if entry_point.group == GROUP:
                by_plugin[entry_point.name] += installations([distribution])
    return [
        error(
            CHECK,
            f"the plugin {plugin!r} is installed twice, by {_listed(where)}; only one is used",
            f"pip uninstall {' or '.join(sorted({w.name for w in where}))}",
        )
        for plugin, where in by_plugin.items()
        if len({w.name for w in where}) > 1
    ]


def _listed(where: Iterable[Installation]) -> str:
    return " and ".join(map(str, where))


def imports() -> list[Finding]:
    """Whether each plugin's entry point imports, and the hooks that are live then."""
    return [_imports(entry_point) for entry_point in sorted(entry_points(group=GROUP))]


def _imports(entry_point: EntryPoint) -> Finding:
    owner = entry_point.dist.name if entry_point.dist else entry_point.name
    plugin = f"the plugin {entry_point.name!r}"
    try:
        live = call(f"{__name__}:hooks", entry_point.name, entry_point.value)
    except CallFailed as failure:
        return error(
            CHECK,
            f"{plugin} does not import from {entry_point.value} ({failure})",
            f"pip install --force-reinstall {owner}, or pip uninstall {owner}",
        )
    if "trimtab_info" not in live:
        return error(CHECK, f"{plugin} does not implement trimtab_info", f"pip uninstall {owner}")
    return ok(CHECK, f"{plugin} is live in {', '.join(live)}")


def hooks(name: str, value: str) -> list[str]:
    """The hooks of the plugin that an entry point names; imports it."""
    return load(EntryPoint(name, value, GROUP)).hooks
