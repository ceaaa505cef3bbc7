"""Lets plugins change the model that a DeepSpeed job trains, where its configuration says so.

DeepSpeed has no hook between its configuration and its engine, so the engine's ``__init__`` is
preceded by ours: there the configuration is read, torch.distributed initialised and ``zero.Init``
over, but no parameter was taken yet.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

from trimtab.core.errors import BadInput, Unsupported
from trimtab.hosts.block import KEY
from trimtab.hosts.deepspeed.config import read_given, training_plugins


def install() -> None:
    """Has every engine that DeepSpeed makes from now on take the changed model."""
    engine = import_module("deepspeed.runtime.engine").DeepSpeedEngine
    own = engine.__init__
    signature = inspect.signature(own)

    @functools.wraps(own)
    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        change(given.arguments)
        own(*given.args, **given.kwargs)

    engine.__init__ = begin


def change(arguments: dict[str, Any]) -> None:
    """Changes the model as the block says, and tells the optimizer of the new parameters.

    Args:
        arguments: of the engine, by their names. The model and the groups of an optimizer are
            changed in place, ``model_parameters`` is replaced.

    Raises:
        BadInput: an option is wrong, the model is none that a plugin can change, or the optimizer
            holds none of its parameters.
    """
    block = read_given(arguments.get("config"))
    enabled = [] if block is None else training_plugins(block)
    changing = [(plugin, options) for plugin, options in enabled if plugin.changes_models]
    if block is None or not changing:
        return
    model = arguments["model"]
    before = {id(parameter) for parameter in model.parameters()}
    shared_by = _sequence_group(arguments.get("mpu"), arguments.get("mesh_device"))
    for plugin, options in changing:
        try:
            plugin.change_model(options, model, shared_by)
        except BadInput as error:
            places = (block.where, f"{KEY}.{plugin.name}", *([error.where] if error.where else []))
            raise BadInput(error.what, where=", ".join(places), fix=error.fix) from None
    new = {name: one for name, one in model.named_parameters() if id(one) not in before}
    if new:
        _tell(arguments, model, new)


def _tell(arguments: dict[str, Any], model: Any, new: Mapping[str, Any]) -> None:
    """Has the optimizer, made already or not, train the new parameters as it does their layers."""
    import_module("deepspeed").set_optimizer_flags(arguments.get("config_class"), model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made = getattr(arguments.get("optimizer"), "param_groups", None)
    if made is not None:
        _join(made, new, names)
    given = arguments.get("model_parameters")
    if given is not None:
        arguments["model_parameters"] = _joined(given, new, names)


def _joined(given: Iterable[Any], new: Mapping[str, Any], names: Mapping[int, str]) -> list[Any]:
    # An iterator over the model's parameters begins only here, and has the new ones.
    items = list(given)
    if items and isinstance(items[0], Mapping):
        groups = [{**group, "params": _several(group["params"])} for group in items]
        _join(groups, new, names)
        return groups
    _join([{"params": items}], new, names)
    return items


def _several(parameters: Any) -> list[Any]:
    """The parameters of a group, which may also be one alone."""
    return [parameters] if hasattr(parameters, "requires_grad") else list(parameters)


def _join(
    groups: Sequence[dict[str, Any]], new: Mapping[str, Any], names: Mapping[int, str]
) -> None:
    """Puts each new parameter into the group of its nearest relative, whose settings it gets."""
    held = {id(parameter): group for group in groups for parameter in group["params"]}
    relatives = [(names[one], group) for one, group in held.items() if one in names]
    for name, parameter in new.items():
        if id(parameter) in held:
            continue
        if not relatives:
            raise BadInput(
                "the optimizer was given no parameter of the model",
                where="deepspeed.initialize",
                fix="give it those of the model, or none",
            )
        _, group = max(relatives, key=lambda relative: _nearness(relative[0], name))
        group["params"].append(parameter)
        if "param_names" in group:
            group["param_names"].append(name)


def _nearness(one: str, other: str) -> tuple[int, bool]:
    """How many modules two parameters share, and whether they are called the same in their own."""
    ours, theirs = one.split("."), other.split(".")
    pairs = enumerate(zip(ours, theirs, strict=False))
    shared = next((at for at, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    return shared, ours[-1] == theirs[-1]


def _sequence_group(mpu: Any, mesh: Any) -> Any | None:
    """The group of ranks that share sequences; None where each rank has its own.

    Raises:
        Unsupported: they do, but DeepSpeed would not sum their gradients.
    """
    if hasattr(mpu, "get_sequence_data_parallel_group"):
        shared = mpu.get_sequence_parallel_world_size() > 1
        return mpu.get_sequence_parallel_group() if shared else None
    if mesh is not None and mesh["sequence_parallel"].size() > 1:
        raise Unsupported(
            "DeepSpeed sums no gradients between ranks that share sequences by a mesh",
            where="sequence_parallel_size",
            fix="leave it and data_parallel_size out, and share by"
            " deepspeed.initialize(mpu=deepspeed.runtime.sequence_parallel.parallel_state_sp)",
        )
    return None
