"""A training launch as a plugin sees it, and what a plugin may change of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Launcher = Literal["deepspeed", "torchrun", "srun"]


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """A training launch that is about to happen.

    Attributes:
        launcher: the kind of launcher, however it is spelled in the command.
        command: the command as it will run, with the changes of the plugins asked before.
        environment: the environment it will run in, likewise.
        hosts: how many ranks each machine gets, in the order in which the machines get them: those
            of the plan, else those that the launcher's options choose of its hostfile; empty where
            neither names any.
    """

    launcher: Launcher
    command: tuple[str, ...]
    environment: Mapping[str, str]
    hosts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LaunchChange:
    """What a plugin changes of a launch; what is left empty stays as it is.

    Attributes:
        environment: variables to set on every machine of the job.
        hosts: how many ranks each machine shall get, in the order in which they shall get them;
            machines left out take no part. Ranks are never permuted inside a running job: the
            launcher is told the order.
        launcher_arguments: options of the launcher itself, put before the ones it has.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    hosts: Mapping[str, int] = field(default_factory=dict)
    launcher_arguments: tuple[str, ...] = ()
