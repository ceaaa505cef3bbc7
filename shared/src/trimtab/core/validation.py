"""Plain data to models; what does not fit becomes one `BadInput` sentence."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar, cast, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from trimtab.core.errors import BadInput
from trimtab.core.wording import KeyPath, LineMap, dotted, nearest, place, shown

M = TypeVar("M")

# pydantic's names for an unknown key, in models and in dataclasses.
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


class Document(BaseModel):
    """Base of the models that users write: immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class InvalidValue(ValueError):
    """Raised by a model's validator when it knows better than pydantic where the fault is.

    Args:
        what: what is wrong, e.g. ``"link to the unknown node 'n9'"``.
        at: path of the key at fault, relative to the model that raises; the message begins with it.
        fix: what would be right.
    """

    def __init__(self, what: str, *, at: KeyPath = (), fix: str = "") -> None:
        self.what, self.at, self.fix = what, at, fix
        super().__init__(f"{what}; {fix}" if fix else what)


def validate(
    model: type[M],
    data: object,
    *,
    where: str,
    lines: LineMap | Callable[[], LineMap | None] | None = None,
) -> M:
    """Makes a model from plain data.

    Args:
        model: a pydantic model or a dataclass; one that forbids extra keys reports unknown ones.
        data: mappings, lists and scalars as read from the user.
        where: the file, or the place in a configuration, that the data comes from.
        lines: the line of each key when the data was read from a file, or what finds them once
            they are needed.

    Raises:
        BadInput: the first fault, and how many more there are.
    """
    try:
        result: M = _adapter(cast(Any, model)).validate_python(data)
    except ValidationError as error:
        found = lines() if callable(lines) else lines
        raise _bad_input(model, data, error, where, found) from None
    except RecursionError:
        raise BadInput("the data is nested too deeply", where=where) from None
    return result


@cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def _bad_input(
    model: type,
    data: object,
    error: ValidationError,
    where: str,
    lines: LineMap | None,
) -> BadInput:
    faults: dict[KeyPath, BadInput] = {}
    # A misspelt key is also a missing one; the spelling is what the user wants to hear of.
    details = sorted(error.errors(include_url=False), key=lambda d: d["type"] not in _UNKNOWN)
    for detail in details:
        path = _data_path(data, detail["loc"], missing=detail["type"] == "missing")
        what, fix, at = _fault(model, detail, path)
        faults.setdefault(path + at, BadInput(what, where=place(where, path + at, lines), fix=fix))
    first = next(iter(faults.values()))
    more = len(faults) - 1
    if not more:
        return first
    return BadInput(f"{first.what} (and {more} more)", where=first.where, fix=first.fix)


def _data_path(data: object, location: KeyPath, *, missing: bool) -> KeyPath:
    """The part of pydantic's location that exists in the data; it also names union members."""
    path: list[str | int] = []
    for index, part in enumerate(location):
        if isinstance(data, Mapping) and part in data:
            data = data[part]
        elif isinstance(data, Sequence) and not isinstance(data, str) and isinstance(part, int):
            data = data[part] if part < len(data) else None
        elif not (missing and index == len(location) - 1):
            continue
        path.append(part)
    return tuple(path)


def _fault(model: type, detail: ErrorDetails, path: KeyPath) -> tuple[str, str, KeyPath]:
    """What is wrong, what would be right, and where below ``path`` it is."""
    key = dotted(path) or "the document"
    context = detail.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, InvalidValue):
        return _named(cause, path), cause.fix, cause.at
    if detail["type"] == "missing":
        return f"{key} is missing", "add it", ()
    if detail["type"] in _UNKNOWN:
        return f"{key} is an unknown key", nearest(str(path[-1]), _keys(model, path[:-1])), ()
    what = f"{key} is {shown(detail['input'])}"
    if isinstance(cause, ValueError):
        # A rule over several keys of a mapping says itself which of them is wrong.
        return (
            (str(cause), "", ()) if isinstance(detail["input"], Mapping) else (what, str(cause), ())
        )
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type", "dataclass_type"):
        return what, "give a mapping of keys to values", ()
    remedy = re.sub(r"^\w+ should", "it should", detail["msg"])
    return what, remedy.replace(" after validation", ""), ()


def _named(error: InvalidValue, path: KeyPath) -> str:
    """What is wrong, with the whole key before it."""
    key, own = dotted(path + error.at), dotted(error.at)
    if own and error.what.startswith(own):
        return key + error.what.removeprefix(own)
    return f"{key}: {error.what}" if key else error.what


def _keys(model: type, path: KeyPath) -> set[str]:
    """The keys that the model allows at a path."""
    models: list[type] = [model]
    for part in path:
        if isinstance(part, str):
            inner = [_models(_annotations(outer).get(part)) for outer in models]
            models = [found for group in inner for found in group] or models
    return {key for found in models for key in _annotations(found)}


def _annotations(model: type) -> dict[str, object]:
    """The annotation of each key of a model or dataclass, as users write the key."""
    if issubclass(model, BaseModel):
        fields = model.model_fields.items()
        return {field.alias or name: field.annotation for name, field in fields}
    return get_type_hints(model)


def _models(annotation: object) -> list[type]:
    if isinstance(annotation, type) and (
        issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)
    ):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]
