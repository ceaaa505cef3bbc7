"""The launchers that are installed still have the options that the wrapper knows by name."""

from __future__ import annotations

import argparse
import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trimtab.core import deepspeed_launcher
from trimtab.core.errors import BadInput
from trimtab.hosts.launcher_command import FLAGS

pytestmark = pytest.mark.integration


def flags(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a parser that take no value, with hyphens."""
    return {
        name.replace("_", "-")
        for action in parser._actions
        for name in action.option_strings
        if action.nargs == 0
    }


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {name.replace("_", "-") for action in parser._actions for name in action.option_strings}


@pytest.fixture
def deepspeed_parser(monkeypatch):
    """DeepSpeed's parser, which it makes in the function that uses it."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.launcher import runner

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, args: parser)
    return runner.parse_args([])


def test_torchrun():
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    assert flags(parser) == FLAGS["torchrun"]
    used = {"--master-addr", "--nnodes", "--node-rank", "--nproc-per-node"}
    assert used | {"--rdzv-backend", "--rdzv-conf"} <= options(parser)


def test_deepspeed(deepspeed_parser):
    assert flags(deepspeed_parser) == FLAGS["deepspeed"]
    assert {"-H", "--hostfile", "--launcher", "--launcher-args", "--master-addr"} <= options(
        deepspeed_parser
    )


def test_deepspeed_reads_the_same_hostfile(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.launcher import runner

    from trimtab.hosts import launcher_command
    from trimtab.hosts.deepspeed import launching

    path = tmp_path / "hosts"
    path.write_text("# ours\n  b slots=2 max=3\na\tslots=4\n\n")
    command = launcher_command.parse(["deepspeed", "-H", str(path), "t.py"])
    assert list(launching.hosts(command).items()) == list(runner.fetch_hostfile(str(path)).items())
    assert launching.DEFAULT_HOSTFILE == runner.DLTS_HOSTFILE
    assert deepspeed_launcher.PDSH_FAN_OUT == runner.PDSH_MAX_FAN_OUT


def test_deepspeed_names_the_hosts_to_pdsh_in_as_many_bytes(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.launcher import runner

    for count in (1, 2, 3, 100):
        devices = {f"n{number}": [*range(number % 9)] for number in range(count)}
        said = runner.encode_world_info(devices)
        assert deepspeed_launcher.world_info_bytes(devices) == len(said)


SLOTS = {"b": 3, "a": 1, "c": 2}

named = st.lists(
    st.sampled_from([*SLOTS]).flatmap(
        lambda host: st.lists(st.integers(0, SLOTS[host] - 1), max_size=3).map(
            lambda numbers: f"{host}:{','.join(map(str, numbers))}" if numbers else host
        )
    ),
    min_size=1,
    max_size=3,
).map("@".join)
choices = (
    st.just([])
    | st.tuples(st.sampled_from(["--include", "-e"]), named).map(list)
    | st.tuples(st.integers(-1, 4), st.integers(-1, 4)).map(
        lambda numbers: [f"--num_nodes={numbers[0]}", "--num_gpus", str(numbers[1])]
    )
)


@given(choices)
@example(["--include", "b:1,1"])
@example(["-e", "b@b:1"])
def test_deepspeed_chooses_the_same_hosts(options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        from deepspeed.launcher import runner

    from trimtab.hosts import launcher_command
    from trimtab.hosts.deepspeed.selection import check_selection, selected

    words = [*options, "t.py"]
    told = runner.parse_args(words)
    active = runner.parse_inclusion_exclusion(SLOTS, told.include, told.exclude)
    active = runner.apply_num_nodes_and_gpus(active, told.num_nodes, told.num_gpus)
    command = launcher_command.parse(["deepspeed", *words])
    assert list(selected(command, SLOTS).items()) == [(h, len(d)) for h, d in active.items()]
    whole = {host: [*range(slots)] for host, slots in SLOTS.items()}
    number = max(told.num_nodes, 0) in (0, 3)  # 4 is all of three, and yet another number
    try:
        check_selection(command, SLOTS)
        assert active == whole
    except BadInput:
        assert active != whole or not number


def test_deepspeed_reads_the_variables_from_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.launcher import runner

    assert os.path.join(runner.DEEPSPEED_ENVIRONMENT_PATHS[0], str(tmp_path)) == str(tmp_path)
    assert {os.path.expanduser("~"), "."} == set(runner.DEEPSPEED_ENVIRONMENT_PATHS)
