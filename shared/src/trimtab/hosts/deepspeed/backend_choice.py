"""DeepSpeed's backend of torch.distributed: that of the plugin which a job's configuration names.

DeepSpeed asks its accelerator for the backend's name, in `initialize` even before it reads the
configuration. So the accelerator answers with the name of our backend, if there is a block for it
in the configuration that `trimtab launch` found, that this process' arguments name, or that
DeepSpeed's own calls were given.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from types import FrameType
from typing import Any

from trimtab.core.launch import LaunchRequest
from trimtab.hosts.deepspeed.config import TrainingBlock, find, read_given, training_plugins
from trimtab.hosts.job_variables import BACKEND_VARIABLE
from trimtab.hosts.torch.backends import GROUP

_ASKED = "communication_backend_name"
_CONFIGURATIONS = ("config", "config_params", "config_dict_or_path")
"""What DeepSpeed's functions call the configuration that they are given."""

log = logging.getLogger("trimtab")


def install() -> None:
    """Has DeepSpeed's accelerator answer with our backend where one is configured."""
    accelerator = import_module("deepspeed.accelerator").get_accelerator()
    own = type(accelerator)

    def name(self: Any) -> str:
        default = str(getattr(super(answering, self), _ASKED)())
        return chosen(sys._getframe(1)) or default

    # The name stays, since DeepSpeed and its users look at it.
    body = {_ASKED: name, "__module__": own.__module__, "__doc__": own.__doc__}
    answering = type(own.__name__, (own,), body)
    accelerator.__class__ = answering


def chosen(caller: FrameType | None) -> str | None:
    """The backend that the job's configuration asks for; its options go to the environment.

    Args:
        caller: who asks; DeepSpeed's functions among its callers may hold the configuration.

    Raises:
        BadInput: the options of its plugin are wrong.
    """
    if not os.environ.get(BACKEND_VARIABLE):
        block = find(sys.argv[1:]) or _given(caller)
        if block is not None:
            _tell(block)
    name = os.environ.get(BACKEND_VARIABLE)
    if name:
        _warn_of_another(name)
    return name or None


def _given(caller: FrameType | None) -> TrainingBlock | None:
    """The block of a configuration that a call of DeepSpeed was given, the innermost first."""
    blocks = (read_given(config) for config in _configurations(caller))
    return next((block for block in blocks if block is not None), None)


def _configurations(caller: FrameType | None) -> Iterator[object]:
    frame = caller
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] == "deepspeed":
            given = frame.f_locals
            yield from (given[key] for key in _CONFIGURATIONS if given.get(key) is not None)
            yield getattr(given.get("args"), "deepspeed_config", None)
        frame = frame.f_back


def _tell(block: TrainingBlock) -> None:
    """Sets what the first plugin with a backend wants its ranks to know."""
    backends = {entry_point.name for entry_point in entry_points(group=GROUP)}
    ours = {name: options for name, options in block.plugins.items() if name in backends}
    for plugin, options in training_plugins(TrainingBlock(ours, block.where)):
        request = LaunchRequest("deepspeed", tuple(sys.argv), os.environ)
        change = plugin.launch(options, request)
        if change is not None:
            os.environ.update(change.environment)
            return


_warned: set[str] = set()


def _warn_of_another(name: str) -> None:
    from torch import distributed

    if name in _warned or not distributed.is_initialized():
        return
    if distributed.get_backend() != name:
        _warned.add(name)
        log.warning(
            "trimtab: the process group was made with the backend %r, so that %r, which the"
            " configuration asks for, is not used; let deepspeed.initialize make the group, or name"
            " the configuration in the job's arguments and no backend in the script",
            distributed.get_backend(),
            name,
        )
