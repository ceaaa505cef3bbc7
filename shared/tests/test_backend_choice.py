"""Which backend DeepSpeed gets from a job's configuration, with stand-ins for it and for torch."""

from __future__ import annotations

import base64
import importlib
import json
import os
import sys
import types

import pytest

from trimtab.core.errors import BadInput
from trimtab.hosts.deepspeed import backend_choice
from trimtab.hosts.job_variables import BACKEND_VARIABLE
from trimtab.hosts.torch import backends
from trimtab.hosts.torch.after_import import after_import

PLUGIN = """
    from pydantic import BaseModel
    from trimtab.core.hooks import PluginInfo, hookimpl
    from trimtab.core.launch import LaunchChange

    class Options(BaseModel, extra="forbid"):
        network: str

    @hookimpl
    def trimtab_info():
        return PluginInfo("plans", 'the "trimtab" block', Options)

    @hookimpl
    def trimtab_launch(config, launch):
        assert launch.launcher == "deepspeed"
        told = {"TRIMTAB_BACKEND": "NAME", "NETWORK": config.network}
        return LaunchChange(environment=told)
"""
DEEPSPEED = """
    from deepspeed.accelerator import get_accelerator

    def initialize(args=None, config=None, config_params=None):
        return get_accelerator().communication_backend_name()

    class Init:
        def __init__(self, config_dict_or_path=None):
            self.backend = initialize()
"""
ACCELERATOR = """
    class Accelerator:
        "One of DeepSpeed's."

        def communication_backend_name(self):
            return "gloo"

    accelerator = Accelerator()
    get_accelerator = lambda: accelerator
"""

BLOCK = {"trimtab": {"plans": {"network": "tree"}, "lays": {"network": "other"}}}


@pytest.fixture
def deepspeed(site, monkeypatch):
    """A DeepSpeed in which our answer is installed; ``plans`` has a backend, ``lays`` has none."""
    site.add(
        "trimtab-plans",
        entry_points={
            "trimtab.plugins": {"plans": "plans_hooks"},
            backends.GROUP: {"plans": "plans_hooks:create"},
        },
        files={"plans_hooks.py": PLUGIN.replace("NAME", "plans")},
    )
    site.add(
        "trimtab-lays",
        entry_points={"trimtab.plugins": {"lays": "lays_hooks"}},
        files={"lays_hooks.py": PLUGIN.replace("NAME", "lays")},
    )
    files = {"deepspeed/__init__.py": DEEPSPEED, "deepspeed/accelerator.py": ACCELERATOR}
    site.add("deepspeed", files=files)
    torch, distributed = types.ModuleType("torch"), types.ModuleType("torch.distributed")
    distributed.is_initialized, distributed.get_backend = lambda: False, lambda: "gloo"
    torch.distributed = distributed
    for name, module in (("torch", torch), ("torch.distributed", distributed)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for name in (BACKEND_VARIABLE, "NETWORK"):
        monkeypatch.setenv(name, "")  # so that what is set in the test is taken back
    for name in ("deepspeed", "deepspeed.accelerator"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    imported = importlib.import_module("deepspeed")
    backend_choice.install()
    yield imported
    for name in ("deepspeed", "deepspeed.accelerator"):
        sys.modules.pop(name, None)


def written(tmp_path) -> str:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(BLOCK))
    return str(path)


def encoded() -> str:
    return base64.urlsafe_b64encode(json.dumps(BLOCK).encode()).decode()


@pytest.mark.parametrize("options", ["mapping", "file", "base64", "args", "old name", "zero.Init"])
def test_a_configuration_given_to_deepspeed_chooses(deepspeed, options, tmp_path) -> None:
    path = written(tmp_path)
    calls = {
        "mapping": lambda: deepspeed.initialize(config=BLOCK),
        "file": lambda: deepspeed.initialize(config=path),
        "base64": lambda: deepspeed.initialize(config=encoded()),
        "args": lambda: deepspeed.initialize(types.SimpleNamespace(deepspeed_config=path)),
        "old name": lambda: deepspeed.initialize(config_params=BLOCK),
        "zero.Init": lambda: deepspeed.Init(config_dict_or_path=BLOCK).backend,
    }
    assert calls[options]() == "plans"
    assert os.environ["NETWORK"] == "tree"
    assert deepspeed.initialize() == "plans"


def test_a_configuration_in_the_arguments_chooses(deepspeed, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--deepspeed_config", written(tmp_path)])
    assert deepspeed.initialize() == "plans"


def test_what_the_launch_said_counts_first(deepspeed, monkeypatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "launched")
    assert deepspeed.initialize(config=BLOCK) == "launched"
    assert os.environ["NETWORK"] == ""


@pytest.mark.parametrize(
    "config", [None, {}, {"trimtab": {}}, {"trimtab": {"lays": {}}}, "nowhere.json", 7]
)
def test_nothing_changes_without_a_block_of_a_backend(deepspeed, config) -> None:
    assert deepspeed.initialize(config=config) == "gloo"
    assert os.environ[BACKEND_VARIABLE] == ""
    accelerator = sys.modules["deepspeed.accelerator"]
    kind = type(accelerator.get_accelerator())
    assert isinstance(accelerator.accelerator, accelerator.Accelerator)
    assert (kind.__name__, kind.__module__, kind.__doc__) == (
        "Accelerator",
        "deepspeed.accelerator",
        "One of DeepSpeed's.",
    )


def test_others_variables_of_the_same_name_are_not_looked_at(deepspeed) -> None:
    config = BLOCK
    assert deepspeed.initialize() == "gloo", config


def test_wrong_options_end_the_call(deepspeed) -> None:
    with pytest.raises(
        BadInput, match=r"the DeepSpeed configuration, trimtab\.plans: network is 1"
    ):
        deepspeed.initialize(config={"trimtab": {"plans": {"network": 1}}})
    with pytest.raises(BadInput, match="it is a list"):
        deepspeed.initialize(config={"trimtab": []})


def test_a_group_that_was_there_before_is_said_once(deepspeed, monkeypatch, caplog) -> None:
    monkeypatch.setattr(backend_choice, "_warned", set())
    monkeypatch.setattr(sys.modules["torch.distributed"], "is_initialized", lambda: True)
    deepspeed.initialize(config=BLOCK)
    deepspeed.initialize(config=BLOCK)
    (message,) = caplog.messages
    assert "made with the backend 'gloo', so that 'plans'" in message


@pytest.fixture
def module(site, monkeypatch):
    """A module that can be imported anew, and the finders as they were."""
    site.add("followed", files={"followed.py": "said = []\n"})
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "followed"
    sys.modules.pop("followed", None)


def test_a_function_follows_an_import_once_and_leaves_nothing(module) -> None:
    before, seen = list(sys.meta_path), []
    after_import(module, lambda: seen.append(sys.modules[module].said))
    followed = importlib.import_module(module)
    assert seen == [[]]
    assert sys.meta_path == before
    assert type(followed.__loader__) is type(followed.__spec__.loader)
    assert type(followed.__loader__).__module__ != "trimtab.hosts.torch.after_import"
    importlib.reload(followed)
    assert len(seen) == 1
    after_import(module, lambda: seen.append("at once"))
    assert seen[1:] == ["at once"]


def test_a_module_that_is_not_there(module) -> None:
    after_import("nowhere_at_all", lambda: pytest.fail("was called"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nowhere_at_all")
