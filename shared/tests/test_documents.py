"""Reading, validating and writing documents: every fault is one sentence, all work is bounded."""

from __future__ import annotations

import errno
import json
import os
import select
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from trimtab.core import documents
from trimtab.core.documents import (
    MAX_DEPTH,
    MAX_FILE_BYTES,
    MAX_NODES,
    Document,
    InvalidValue,
    digest,
    parse_json,
    parse_yaml,
    read_json,
    read_lines,
    read_text,
    read_yaml,
    validate,
    write_atomic,
)
from trimtab.core.errors import BadInput


class Cable(Document):
    a: str
    bandwidth: float = Field(gt=0)
    kind: Literal["copper", "fibre"] = "fibre"


class Network(Document):
    cables: list[Cable]
    size: int | None = None
    best: Cable | None = None

    @model_validator(mode="after")
    def _known(self) -> Network:
        if any(cable.a == "nowhere" for cable in self.cables):
            raise InvalidValue("it leads nowhere", at=("cables", 0, "a"), fix="name a place")
        return self


CABLES = "cables:\n- a: x\n  bandwidth: 1\n"


def message_of(tmp_path: Path, text: str, reader=read_yaml, name="net.yaml") -> str:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        reader(path, Network)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert message.endswith(".")
    return message.removeprefix(str(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "cables:\n- a: x\n  bandwidth: -1\n",
            ":3: cables[0].bandwidth is -1; it should be greater than 0.",
        ),
        (
            "cables:\n- a: x\n  bandwidth: .nan\n",
            ":3: cables[0].bandwidth is nan; it should be a finite number.",
        ),
        (
            "cables:\n- a: x\n  bandwith: 1\n",
            ":3: cables[0].bandwith is an unknown key (and 1 more); "
            "the nearest known one is 'bandwidth'.",
        ),
        (
            CABLES + "qqq: 1\n",
            ":4: qqq is an unknown key; known are best, cables, size.",
        ),
        (
            CABLES + "  kind: tin\n",
            ":4: cables[0].kind is 'tin'; it should be 'copper' or 'fibre'.",
        ),
        (CABLES + "best: {a: y}\n", ":4: best.bandwidth is missing; add it."),
        (
            CABLES + f"size: {'x' * 500}\n",
            f":4: size is '{'x' * 59}…; it should be a valid integer, "
            "unable to parse string as an integer.",
        ),
        ("cables: 3\n", ":1: cables is 3; it should be a valid list."),
        ("- 1\n", ":1: the document is a list of length 1; give a mapping of keys to values."),
        ("cables:\n- 3\n", ":2: cables[0] is 3; give a mapping of keys to values."),
        (
            "cables:\n- a: nowhere\n  bandwidth: 1\n",
            ":2: cables[0].a: it leads nowhere; name a place.",
        ),
        ("cables: []\ncables: []\n", ":2: the key 'cables' is given twice; give it once."),
        ("cables: [\n", ":2: this is no YAML: did not find expected node content."),
        ("cables: *gone\n", ":1: the alias *gone has no anchor before it; define it first."),
        (
            "cables: !!python/none x\n",
            ":1: the tag 'tag:yaml.org,2002:python/none' is not known; leave it out.",
        ),
        ("cables: !secret x\n", ":1: the tag '!secret' is not known; leave it out."),
        ("cables: !!seq x\n", ":1: the tag 'tag:yaml.org,2002:seq' is not known; leave it out."),
        ("cables: !!bool x\n", ":1: 'x' is no bool; quote it if it is text."),
        ("cables: !!int ''\n", ":1: '' is no int; quote it if it is text."),
        ("cables: 0000-00-00\n", ":1: '0000-00-00' is no timestamp; quote it if it is text."),
        (f"cables: {'9' * 5000}\n", f":1: '{'9' * 59}… is no int; quote it if it is text."),
        ("? [a]\n: 1\n", ":1: a key is a mapping or a list; give a plain key."),
        ("a: 1\n---\nb: 1\n", ":2: a second document begins; give one document in each file."),
        ("<<: 3\n", ":1: << merges something that is no mapping; merge a mapping."),
        (" \n", ": the file is empty."),
    ],
)
def test_a_fault_in_yaml_is_one_sentence_with_its_place(tmp_path, text, expected):
    assert message_of(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{"cables": [\n {"a": "x", "bandwidth": 0}]}',
            ":2: cables[0].bandwidth is 0; it should be greater than 0.",
        ),
        ('{"cables": [],\n "cables": []}', ": the key 'cables' is given twice; give it once."),
        ('{"cables": [\n', ":2: this is no JSON: Expecting value in column 1."),
        ('{"cables": [NaN]}', ": NaN is no JSON number; give a finite number."),
        ("[" * 100_000, ": the JSON is nested too deeply."),
    ],
)
def test_a_fault_in_json_is_one_sentence_with_its_place(tmp_path, text, expected):
    assert message_of(tmp_path, text, read_json, "net.json") == expected


def test_merge_keys_and_aliases_fill_in_what_is_not_given(tmp_path):
    path = tmp_path / "net.yaml"
    path.write_text("cables:\n- &base {a: x, bandwidth: 1}\n- {<<: *base, a: y}\nbest: *base\n")
    network = read_yaml(path, Network)
    assert [cable.a for cable in network.cables] == ["x", "y"]
    assert network.best == network.cables[0]


def test_a_fault_behind_an_alias_is_placed_where_the_alias_stands(tmp_path):
    text = "cables: []\nbest: &b {a: x, bandwidth: 1}\n"
    text += "size: *b\n"
    assert message_of(tmp_path, text).startswith(":3: size is a mapping of length 2;")


def yaml_bomb(levels: int, width: int = 9) -> str:
    def line(level: int) -> str:
        value = f"*l{level - 1}" if level else "x"
        return f"l{level}: &l{level} [{', '.join([value] * width)}]"

    return "\n".join(line(level) for level in range(levels))


def test_a_yaml_bomb_is_refused_after_a_bounded_number_of_values(tmp_path):
    # Fully expanded, 100 levels are 9**100 values; refusing them ends while level 5 is read.
    message = message_of(tmp_path, yaml_bomb(100))
    assert message == (
        f":6: more than {MAX_NODES:,} values, with every alias expanded; give a smaller document."
    )


def test_the_count_of_expanded_values_is_exact():
    # A list counts itself and each of its values once for each alias.
    half = "[" + ",".join(["1"] * (MAX_NODES // 2 - 5)) + "]"
    data, _ = parse_yaml(f"a: &a {half}\nb: *a\n", where="f")
    assert data["a"] is data["b"]
    with pytest.raises(BadInput, match="more than"):
        parse_yaml(f"a: &a {half}\nb: *a\nc: [1, 1, 1, 1, 1]\n", where="f")


def test_the_depth_of_yaml_is_bounded(tmp_path):
    parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, where="f")
    message = message_of(tmp_path, "[" * 1_000_000)
    assert message == f":1: nested deeper than {MAX_DEPTH} levels; give a flatter document."


@pytest.mark.parametrize("reader", [read_yaml, read_json])
def test_50_mb_of_nonsense_are_refused_without_being_read(tmp_path, monkeypatch, reader):
    path = tmp_path / "nonsense"
    with path.open("wb") as file:
        file.truncate(50_000_000)
    monkeypatch.setattr(documents, "parse_yaml", None)
    monkeypatch.setattr(documents, "parse_json", None)
    with pytest.raises(BadInput) as caught:
        reader(path, Network)
    expected = f"{path}: the file is larger than {MAX_FILE_BYTES:,} bytes; give a smaller one."
    assert str(caught.value) == expected


def test_an_endless_device_is_read_no_further_than_the_limit():
    with pytest.raises(BadInput, match="larger than 1,000 bytes"):
        read_text("/dev/zero", max_bytes=1000)


def test_the_file_itself_may_be_at_fault(tmp_path):
    def message(path: Path) -> str:
        with pytest.raises(BadInput) as caught:
            read_text(path)
        return str(caught.value).removeprefix(str(path))

    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nname: \xe9t\xe9\n")
    assert message(latin) == ":2: byte 0xe9 is not UTF-8; give a UTF-8 text file."
    assert message(tmp_path / "gone") == ": there is no such file."
    assert message(tmp_path) == ": this is a folder; give a file."
    assert message(latin / "below").startswith(": the file cannot be read (")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "net.yaml"
    path.write_bytes(b"\xef\xbb\xbfcables: []\n")
    assert read_yaml(path, Network) == Network(cables=[])


@dataclass
class Point:
    x: int


def test_dataclasses_are_validated_too():
    assert validate(Point, {"x": 1}, where="here") == Point(1)
    with pytest.raises(BadInput, match=r"^here: x is 'a'; it should be a valid integer"):
        validate(Point, {"x": "a"}, where="here")


def test_lines_are_read_one_at_a_time_with_their_numbers(tmp_path):
    path = tmp_path / "lines"
    path.write_text("a\r\n\n b\nlast")
    assert list(read_lines(path)) == [(1, "a"), (3, " b"), (4, "last")]
    path.write_bytes(b"a\n" + b"x" * 50_000_000)
    lines = read_lines(path)
    assert next(lines) == (1, "a")
    with pytest.raises(BadInput, match=r":2: the line is longer than 1,048,576 bytes"):
        next(lines)
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(BadInput, match=r":2: byte 0xff is not UTF-8"):
        list(read_lines(path))


keys = st.text("abcdefgh", min_size=1, max_size=8) | st.sampled_from("abcd")
scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.floats(-1e9, 1e9)
plain = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4)
)


@given(plain)
def test_yaml_reads_as_pyyaml_reads_it(data):
    for flow in (True, False):
        text = yaml.safe_dump(data, default_flow_style=flow)
        assert parse_yaml(text, where="f")[0] == yaml.safe_load(text)


@given(st.dictionaries(keys, st.lists(st.dictionaries(keys, st.integers()), max_size=3)))
def test_every_key_has_the_line_it_stands_on(data):
    text = yaml.safe_dump(data, default_flow_style=False)
    _, lines = parse_yaml(text, where="f")
    rows = text.splitlines()
    for path, line in lines.items():
        if path and isinstance(path[-1], str):
            assert rows[line - 1].lstrip(" -").startswith((f"{path[-1]}:", f"? {path[-1]}"))


@given(st.text())
def test_text_is_data_or_bad_input_and_nothing_else(text):
    for parse in (parse_yaml, parse_json):
        with suppress(BadInput):
            parse(text, where="f")


def pruned(data, keys):
    if isinstance(data, list):
        return [pruned(item, keys) for item in data]
    if isinstance(data, dict):
        return {key: pruned(value, keys) for key, value in data.items() if key not in keys}
    return data


@given(plain, st.sets(st.sampled_from("abcd")))
def test_keys_are_left_out_wherever_they_stand(data, without):
    text = json.dumps(data)
    assert parse_json(text, where="f", without=without) == pruned(json.loads(text), without)


def test_writing_replaces_the_whole_file_and_keeps_its_mode(tmp_path):
    path = tmp_path / "plan.json"
    write_atomic(path, "one")
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    path.chmod(0o640)
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o640
    link = tmp_path / "link"
    link.symlink_to(path)
    write_atomic(link, "three")
    assert link.is_symlink()
    assert path.read_text() == "three"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "plan.json"]


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("failing", "number", "expected"),
    [
        ("fsync", errno.ENOSPC, "the disk is full; free some space."),
        ("fsync", errno.EIO, "the file cannot be written (Input/output error)."),
        ("replace", errno.EACCES, "the folder may not be written; check its permissions."),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path, monkeypatch, failing, number, expected
):
    path = tmp_path / "plan.json"
    path.write_text("old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(documents.os, failing, fail)
    with pytest.raises(BadInput) as caught:
        write_atomic(path, "new")
    assert str(caught.value) == f"{path}: {expected}"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    for folder in (tmp_path, link):
        with pytest.raises(BadInput, match="this is a folder; give the name of a file"):
            write_atomic(folder, "x")
    with pytest.raises(BadInput, match=r"there is no folder .*gone; make it first"):
        write_atomic(tmp_path / "gone" / "plan.json", "x")
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(BadInput, match=r"cannot be written .*symbolic links"):
        write_atomic(circle, "x")
    assert circle.is_symlink()


def test_a_link_to_a_file_that_is_not_there_yet_makes_it(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("plan.json")
    write_atomic(link, "x")
    assert link.is_symlink()
    assert (tmp_path / "plan.json").read_text() == "x"


def device_at(path: Path, minor: int, kind: int = stat.S_IFCHR, major: int = 1) -> Path:
    try:
        os.mknod(path, 0o666 | kind, os.makedev(major, minor))
        if kind == stat.S_IFCHR:
            os.close(os.open(path, os.O_WRONLY))
    except PermissionError:
        pytest.skip("only root makes devices")
    return path


@pytest.mark.parametrize("linked", [False, True])
def test_a_device_takes_the_content_and_stays_a_device(tmp_path, linked):
    null = device_at(tmp_path / "null", minor=3)
    target = null
    if linked:
        target = tmp_path / "link"
        target.symlink_to("null")
    write_atomic(target, "x" * 100_000)
    assert null.is_char_device()
    assert target.is_symlink() == linked
    assert len(list(tmp_path.iterdir())) == 1 + linked


@pytest.mark.parametrize("content", ["x", "x" * 100_000])
def test_a_full_device_is_a_full_disk(tmp_path, content):
    full = device_at(tmp_path / "full", minor=7)
    with pytest.raises(BadInput) as caught:
        write_atomic(full, content)
    assert str(caught.value) == f"{full}: the disk is full; free some space."
    assert full.is_char_device()


def test_a_disk_is_not_written_over(tmp_path):
    disk = device_at(tmp_path / "disk", 0, stat.S_IFBLK, major=240)  # a number for experiments
    with pytest.raises(BadInput, match="this is a disk; give the name of a file"):
        write_atomic(disk, "x")
    assert disk.is_block_device()


@pytest.fixture
def pipe(tmp_path):
    """A pipe's path, and a descriptor that reads from it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(reader, "rb", buffering=0) as file:
        yield path, file


def arrived(reader) -> bool:
    return bool(select.select([reader], [], [], 20)[0])


def test_a_pipe_takes_the_content_as_it_comes(pipe):
    path, reader = pipe
    content = b"0123456789" * 20_000
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_atomic, path, content)
        found = b""
        while arrived(reader) and (part := reader.read(2**16)):
            found += part
        writing.result(timeout=20)
    assert found == content
    assert path.is_fifo()


def test_a_pipe_whose_reader_leaves_is_one_sentence(pipe):
    path, reader = pipe
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_atomic, path, b"x" * 10_000_000)
        assert arrived(reader)
        reader.close()
        with pytest.raises(BadInput, match=r"cannot be written \(Broken pipe\)"):
            writing.result(timeout=20)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/stderr", "result"])
def test_the_file_that_output_goes_to_keeps_all_of_it_in_order(tmp_path, name):
    program = (
        "import sys; from trimtab.core.documents import write_atomic\n"
        "stream = sys.stderr if 'err' in sys.argv[1] else sys.stdout\n"
        "print('before', file=stream)\n"
        "write_atomic(sys.argv[1], 'content ')\n"
        "print('after', file=stream)\n"
    )
    result = tmp_path / "result"
    with result.open("w") as out:
        streams = {"stderr" if "err" in name else "stdout": out}
        command = [sys.executable, "-c", program, name]
        subprocess.run(command, check=True, cwd=tmp_path, **streams)
    assert result.read_text() == "before\ncontent after\n"


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_closed_stream_does_not_matter(tmp_path, closed):
    program = "from trimtab.core.documents import write_atomic; write_atomic('result', 'content')"
    command = f'"$1" -c "$2" {closed}>&-'
    words = ["sh", "-c", command, "sh", sys.executable, program]
    subprocess.run(words, check=True, cwd=tmp_path)
    assert (tmp_path / "result").read_text() == "content"


def test_a_digest_follows_the_content_only(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest(path) == known
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest(Network(cables=[])) == digest({"cables": [], "size": None, "best": None})
    assert digest(Point(1)) == digest({"x": 1})
    with pytest.raises(BadInput, match="no such file"):
        digest(tmp_path / "gone")
