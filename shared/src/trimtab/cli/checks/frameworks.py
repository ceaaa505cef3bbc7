"""The frameworks' versions against the range that the hosts were verified with."""

from __future__ import annotations

from trimtab.cli.checks.finding import Finding, error, ok
from trimtab.hosts import versions


def verified() -> list[Finding]:
    """Whether each framework that is installed is in its verified range."""
    return [_verified(framework) for framework in versions.VERIFIED]


def _verified(framework: str) -> Finding:
    check = "frameworks"
    found, range_ = versions.installed(framework), versions.VERIFIED[framework]
    if found is None:
        return ok(check, f"{framework} is not installed (verified: {range_})")
    problem = versions.check(framework)
    if problem is not None:
        return error(check, f"{problem.what}, {range_}", problem.fix)
    return ok(check, f"{framework} {found} is in the verified range, {range_}")
