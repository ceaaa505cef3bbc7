"""The "trimtab" block of a DeepSpeed configuration, read without DeepSpeed."""

from __future__ import annotations

import base64
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.errors import BadInput
from trimtab.hosts.block import enabled
from trimtab.hosts.deepspeed import find, training_plugins
from trimtab.hosts.deepspeed.config import TrainingBlock

PLUGIN = """
    from pydantic import BaseModel, Field
    from trimtab.core.hooks import PluginInfo, hookimpl

    class Options(BaseModel, extra="forbid"):
        rows: int = Field(1, ge=1)

    @hookimpl
    def trimtab_info():
        return PluginInfo("lays ranks", 'the "trimtab" block', Options)
"""
LAUNCHES = """
    @hookimpl
    def trimtab_launch(config, launch):
        return None
"""


@pytest.fixture
def plugins(site):
    """``lays`` is about training, ``serves`` is not."""
    for name, source in (("lays", PLUGIN + LAUNCHES), ("serves", PLUGIN)):
        site.add(
            f"trimtab-{name}",
            entry_points={"trimtab.plugins": {name: f"{name}_options"}},
            files={f"{name}_options.py": source},
        )
    return site


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes ``ds.json`` in the working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda text: (tmp_path / "ds.json").write_text(text)


BLOCK = {"lays": {"rows": 2}, "more": {}}
CONFIG = json.dumps({"train_batch_size": 8, "trimtab": BLOCK})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--deepspeed_config", "ds.json"],
        ["--deepspeed_config=ds.json"],
        ["--deepspeed-config", "ds.json"],
        ["--deepspeed", "ds.json", "--epochs", "3"],
        ["train.py", "--deepspeed", "--deepspeed_config", "ds.json"],
        ["--config", "ds.json"],
        ["--deepspeed_config", "other.json", "--deepspeed_config", "ds.json"],
        ["--config", "model.json", "--deepspeed_config", "ds.json"],
    ],
)
def test_found_however_the_script_names_it(written, tmp_path, arguments):
    written(CONFIG)
    (tmp_path / "other.json").write_text('{"trimtab": {}}')
    (tmp_path / "model.json").write_text('{"trimtab": 3}')
    block = find(arguments)
    assert block == TrainingBlock(BLOCK, "ds.json")
    assert list(block.plugins) == ["lays", "more"]


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4))
def test_found_in_base64(options):
    text = json.dumps({"trimtab": {"lays": options}})
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    block = find(["train.py", "--deepspeed_config", encoded])
    assert block == TrainingBlock({"lays": options}, "--deepspeed_config in base64")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], CONFIG),
        (["--deepspeed_config"], CONFIG),
        (["--deepspeed_config", "gone.json"], CONFIG),
        (["--deepspeed", "--epochs", "3"], CONFIG),
        (["--deepspeed_config", "."], CONFIG),
        (["--deepspeed_config", "ds.json"], ""),
        (["--deepspeed_config", "ds.json"], "{no JSON, and no business of ours"),
        (["--deepspeed_config", "ds.json"], '{"train_batch_size": 8}'),
        (["--deepspeed_config", "ds.json"], '["trimtab"]'),
        (["--deepspeed_config", "ds.json"], '{"output": "trimtab"}'),
        (["--config", "ds.yaml"], "trimtab: {no JSON: either}"),
    ],
)
def test_no_block_is_left_to_the_script(written, tmp_path, arguments, text):
    written(text)
    (tmp_path / "ds.yaml").write_text(text)
    assert find(arguments) is None


def test_an_empty_block_switches_nothing_on(written):
    written('{"trimtab": {}}')
    block = find(["--deepspeed_config", "ds.json"])
    assert block is not None
    assert training_plugins(block) == []


def test_json_with_comments_is_read_where_deepspeed_brings_its_reader(written, site, monkeypatch):
    written('{"trimtab": {"lays": {}} // soon\n}')
    monkeypatch.setitem(sys.modules, "hjson", None)
    with pytest.raises(BadInput, match=r"^ds\.json:1: this is no JSON"):
        find(["--deepspeed_config", "ds.json"])
    monkeypatch.delitem(sys.modules, "hjson")
    site.add("hjson", files={"hjson.py": "def loads(text): return {'trimtab': {'lays': {}}}"})
    assert find(["--deepspeed_config", "ds.json"]) == TrainingBlock({"lays": {}}, "ds.json")


def test_broken_json_with_a_block_is_refused_by_its_line(written):
    written('{\n"trimtab": {"lays": {}\n')
    with pytest.raises(BadInput, match=r"^ds\.json:\d: this is no JSON"):
        find(["--deepspeed_config", "ds.json"])


@pytest.mark.parametrize("block", [None, 3, "lays", ["lays"]])
def test_a_block_that_is_no_mapping(written, block):
    written(json.dumps({"trimtab": block}))
    with pytest.raises(BadInput, match=r"^ds\.json, trimtab: it is a \w+; give a mapping such as"):
        find(["--deepspeed_config", "ds.json"])


def test_the_block_of_a_configuration_in_memory():
    assert enabled({"train_batch_size": 8}, where="the engine") == {}
    assert enabled({"trimtab": BLOCK}, where="the engine") == BLOCK


def test_switched_on_plugins_come_in_the_users_order_with_their_options(plugins):
    plugins.add(
        "trimtab-also",
        entry_points={"trimtab.plugins": {"also": "also_options"}},
        files={"also_options.py": PLUGIN + LAUNCHES},
    )
    block = TrainingBlock({"lays": {"rows": 2}, "also": {}}, "ds.json")
    found = [(plugin.name, options) for plugin, options in training_plugins(block)]
    assert found == [("lays", {"rows": 2}), ("also", {})]


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ({"lay": {}}, "^ds.json, trimtab: no plugin 'lay' is installed; installed are: .*lays"),
        ({"lays": {"row": 2}}, "^ds.json, trimtab.lays: row is an unknown key; .*'rows'"),
        ({"lays": {"rows": 0}}, "^ds.json, trimtab.lays: rows is 0; it should be greater than"),
        ({"lays": 3}, "^ds.json, trimtab.lays: "),
        ({"serves": {}}, "^ds.json, trimtab.serves: this plugin does nothing in training; leave"),
    ],
)
def test_each_fault_names_the_file_the_key_and_the_remedy(plugins, block, sentence):
    with pytest.raises(BadInput, match=sentence):
        training_plugins(TrainingBlock(block, "ds.json"))
