"""What the user switched on for training: the ``"trimtab"`` block of the DeepSpeed configuration.

DeepSpeed keeps top-level keys that it does not know, so the block needs no file of its own.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.documents import parse_json, read_text
from trimtab.core.errors import BadInput
from trimtab.hosts.block import KEY, enabled

if TYPE_CHECKING:
    from trimtab.core.hooks import Plugin

OPTIONS = ("--deepspeed_config", "--deepspeed", "--config")
"""The arguments of a training script that name its DeepSpeed configuration, the surest first."""


@dataclass(frozen=True, slots=True)
class TrainingBlock:
    """The ``"trimtab"`` block of a DeepSpeed configuration.

    Attributes:
        plugins: the options of each plugin by its name, in the user's order.
        where: the file, or the argument, that the block stands in.
    """

    plugins: Mapping[str, object]
    where: str


def find(arguments: Sequence[str]) -> TrainingBlock | None:
    """The block of the DeepSpeed configuration that a training script's arguments name.

    The configuration may be a file or, as DeepSpeed's own tuner passes it, base64 text. One that
    is missing or cannot be read is left to the script to complain about.

    Returns:
        None where there is no configuration, or no block in it.

    Raises:
        BadInput: a configuration has a block but is no JSON, or the block is no mapping.
    """
    blocks = (_block_in(text, where) for where, text in _configurations(arguments))
    return next((block for block in blocks if block is not None), None)


def read_given(config: object) -> TrainingBlock | None:
    """The block of a configuration as a script passes it to DeepSpeed.

    Args:
        config: a mapping, the path of a file, or base64 text; anything else has no block, and a
            file that cannot be read is left to DeepSpeed to complain about.

    Raises:
        BadInput: a configuration has a block but is no JSON, or the block is no mapping.
    """
    if isinstance(config, Mapping):
        where = "the DeepSpeed configuration"
        return TrainingBlock(enabled(config, where=where), where) if KEY in config else None
    if not isinstance(config, (str, Path)):
        return None
    try:
        where, text = str(config), read_text(config)
    except BadInput:
        where, text = "the DeepSpeed configuration in base64", _decoded(str(config)) or ""
    return _block_in(text, where)


def read_block(path: str | Path) -> TrainingBlock:
    """The block of a configuration file.

    Raises:
        BadInput: the file cannot be read, is no JSON, or has no block.
    """
    where = str(path)
    config = _parse(read_text(path), where)
    if not isinstance(config, Mapping) or KEY not in config:
        raise BadInput(
            f"there is no {KEY!r} block",
            where=where,
            fix='add one, such as {"trimtab": {"placement": {"plan": "plan.json"}}}',
        )
    return TrainingBlock(enabled(config, where=where), where)


def training_plugins(block: TrainingBlock) -> list[tuple[Plugin, object]]:
    """The plugins that a block switches on, with their options, which are checked.

    Raises:
        BadInput: a plugin is not installed, is not about training, or its options are wrong.
    """
    from trimtab.core.hooks import plugin

    found = []
    for name, options in block.plugins.items():
        try:
            chosen = plugin(name)
            if not chosen.trains:
                raise BadInput(
                    "this plugin does nothing in training",
                    where=f"{KEY}.{name}",
                    fix=f"leave it out here; it is switched on with {chosen.info.enable}",
                )
            chosen.configure(options)
        except BadInput as error:
            where = f"{block.where}, {error.where or KEY}"
            raise BadInput(error.what, where=where, fix=error.fix) from None
        found.append((chosen, options))
    return found


def _configurations(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Where each configuration that the arguments name is, and its text."""
    for option in OPTIONS:
        for value in reversed(list(_values(arguments, option))):
            # A script's --config may be any file; DeepSpeed's own arguments are always its JSON.
            path = Path(value)
            if option != "--config" or path.suffix == ".json":
                with suppress(BadInput):
                    yield value, read_text(path)
            text = _decoded(value)
            if text is not None:
                yield f"{option} in base64", text


def _block_in(text: str, where: str) -> TrainingBlock | None:
    """The block in a configuration's text; None where it has none."""
    config = _parse(text, where) if KEY in text else None
    if isinstance(config, Mapping) and KEY in config:
        return TrainingBlock(enabled(config, where=where), where)
    return None


def _values(arguments: Sequence[str], option: str) -> Iterator[str]:
    for at, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name.replace("-", "_") == option.replace("-", "_"):
            if equals:
                yield value
            elif at + 1 < len(arguments):
                yield arguments[at + 1]


def _decoded(value: str) -> str | None:
    """The JSON object that a word holds in base64, if it does."""
    try:
        text = base64.urlsafe_b64decode(value).decode()
    except (binascii.Error, ValueError):
        return None
    return text if text.lstrip().startswith("{") else None


def _parse(text: str, where: str) -> Any:
    """JSON, or what else DeepSpeed reads where it is installed: JSON with comments."""
    try:
        return parse_json(text, where=where)
    except BadInput:
        try:
            return import_module("hjson").loads(text)
        except ImportError:
            pass
        except ValueError:  # the reason that plain JSON gives is the clearer one
            pass
        raise
