"""Backends of torch.distributed that plugins bring, usable by name without an import.

A plugin declares one by an entry point of `GROUP`: its name is the backend's name, its value the
``module:function`` that makes a process group from ``(options, backend_options)``, as for torch's
``register_backend(..., extended_api=True)``. torch calls `register` at the end of ``import torch``
(entry point group ``torch.backends``; ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` prevents that), which is
why this module imports nothing that may be missing, and no plugin before its backend is used.
Where there are such backends, DeepSpeed's import is followed by
`trimtab.hosts.deepspeed.backend_choice`, and always by `trimtab.hosts.deepspeed.model_change`; in a
job with a plan, `trimtab.hosts.torch.first_step` is armed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from trimtab.hosts.torch import first_step
from trimtab.hosts.torch.after_import import after_import

GROUP = "trimtab.torch_backends"

DEVICES = ["cpu", "cuda"]
"""The devices of a registered backend, as a list: torch walks a plain string letter by letter."""

_DEEPSPEED = "deepspeed.comm.comm"
"""The module by which DeepSpeed initialises torch.distributed."""

_ENGINE = "deepspeed.runtime.engine"
"""The module of the engines that take models to train."""


def register() -> None:
    """Registers the backends of all installed plugins; a failure is logged and never raised."""
    try:
        found = list(entry_points(group=GROUP))
    except Exception as error:
        _warn("the plugins cannot be listed", error)
        return
    for entry_point in found:
        try:
            _register(entry_point)
        except Exception as error:
            _warn(f"the backend {entry_point.name!r} is not registered", error)
    if found:
        after_import(_DEEPSPEED, _choose_backend)
    after_import(_ENGINE, _change_models)
    try:
        first_step.arm()
    except Exception as error:
        _warn("the job will not be checked against its plan", error)


def _register(entry_point: EntryPoint) -> None:
    from torch import distributed

    if not distributed.is_available():  # a torch built without it
        return
    backend, name = distributed.Backend, entry_point.name
    if name.lower() not in backend.backend_list:
        backend.register_backend(
            name, _creator(entry_point), extended_api=True, devices=list(DEVICES)
        )


def _creator(entry_point: EntryPoint) -> Callable[[Any, Any], Any]:
    """The function that makes the process group; it imports the plugin when it is first called."""

    def create(options: Any, backend_options: Any) -> Any:
        return entry_point.load()(options, backend_options)

    return create


def _choose_backend() -> None:
    try:
        from trimtab.hosts.deepspeed import backend_choice

        backend_choice.install()
    except Exception as error:
        _warn("DeepSpeed will not choose a backend by its configuration", error)


def _change_models() -> None:
    try:
        from trimtab.hosts.deepspeed import model_change

        model_change.install()
    except Exception as error:
        _warn("DeepSpeed's models will not be changed by its configuration", error)


def _warn(what: str, error: Exception) -> None:
    # Logging, since a warning becomes an error under -W error, which would break import torch.
    logging.getLogger("trimtab").warning("trimtab: %s (%s: %s)", what, type(error).__name__, error)
