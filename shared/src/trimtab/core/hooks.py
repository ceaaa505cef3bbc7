"""The hook specifications: all that a plugin can contribute, on one screen.

A plugin is a module named by an entry point of the group ``trimtab.plugins``; it implements the
hooks it needs with ``@hookimpl``. Its entry point's name is the plugin's name, and the key of its
block in the frameworks' ``"trimtab"`` configuration.

Backends of torch.distributed are no hook but entry points of the group ``trimtab.torch_backends``
(see `trimtab.hosts.torch.backends`): ``import torch`` must find them without importing a plugin.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points

import pluggy
from pydantic import BaseModel
from typer import Typer

from trimtab.core.benchmark import Benchmark
from trimtab.core.branch_scoring import ScorerFactory
from trimtab.core.errors import BadInput
from trimtab.core.launch import LaunchChange, LaunchRequest
from trimtab.core.policy import CallField, ServingPolicy

GROUP = "trimtab.plugins"

hookspec = pluggy.HookspecMarker("trimtab")
hookimpl = pluggy.HookimplMarker("trimtab")


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """A plugin's line in ``trimtab plugins``."""

    summary: str
    enable: str
    """The flag or configuration that switches the plugin on."""
    config: type[BaseModel] | None = None
    """The model of its block of options, under the plugin's name."""
    call_fields: Mapping[str, CallField] = field(default_factory=dict)
    """What clients may say of a call, by the name behind ``trimtab.`` in ``vllm_xargs``."""


@hookspec(firstresult=True)
def trimtab_info() -> PluginInfo:
    """Says what the plugin is, how it is switched on, and which options it has."""
    raise NotImplementedError


@hookspec(firstresult=True)
def trimtab_serving_policy(config: BaseModel) -> ServingPolicy | None:
    """Makes the policy that an engine host or the simulator drives, from the plugin's options."""


@hookspec(firstresult=True)
def trimtab_branch_scorers() -> Mapping[str, ScorerFactory]:
    """Offers reward signals to the plugin ``branches``, by their names in its configuration."""
    raise NotImplementedError


@hookspec(firstresult=True)
def trimtab_launch(config: BaseModel, launch: LaunchRequest) -> LaunchChange | None:
    """Changes a training launch, from the plugin's options; for plugins about training."""


@hookspec
def trimtab_training_model(config: BaseModel, model: object, sequence_group: object) -> None:
    """Changes a torch module in place, from the plugin's options, before DeepSpeed trains it.

    ``sequence_group`` is the group of torch.distributed that shares each sequence (DeepSpeed's
    Ulysses), None where no ranks do. What is wrong with the model is a `BadInput`.
    """


@hookspec
def trimtab_first_step() -> None:
    """Looks at a job with a plan from inside: on every rank, before its first optimizer step."""


@hookspec
def trimtab_benchmarks() -> Sequence[Benchmark]:
    """The benchmarks under ``trimtab bench``."""
    raise NotImplementedError


@hookspec
def trimtab_commands(app: Typer) -> None:
    """Adds commands to the ``trimtab`` command line; import what they need inside them."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """An installed plugin whose entry point imports."""

    name: str
    entry_point: EntryPoint
    manager: pluggy.PluginManager

    @property
    def info(self) -> PluginInfo:
        """What the plugin says of itself."""
        info: PluginInfo = self.manager.hook.trimtab_info()
        return info

    @property
    def has_serving_policy(self) -> bool:
        """Whether the plugin has a policy for serving."""
        return bool(self.manager.hook.trimtab_serving_policy.get_hookimpls())

    @property
    def trains(self) -> bool:
        """Whether the plugin is about training, and so may stand in a DeepSpeed configuration."""
        return bool(self.manager.hook.trimtab_launch.get_hookimpls()) or self.changes_models

    @property
    def changes_models(self) -> bool:
        """Whether the plugin changes the model that a DeepSpeed job trains."""
        return bool(self.manager.hook.trimtab_training_model.get_hookimpls())

    @property
    def hooks(self) -> list[str]:
        """The names of the hooks that the plugin implements."""
        callers = self.manager.get_hookcallers(self.manager.get_plugin(self.name)) or []
        return sorted(caller.name for caller in callers)

    def serving_policy(self, options: object) -> ServingPolicy | None:
        """The plugin's policy for its block of options (a mapping as read from the user)."""
        policy: ServingPolicy | None = self.manager.hook.trimtab_serving_policy(
            config=self.configure(options)
        )
        return policy

    def branch_scorers(self) -> Mapping[str, ScorerFactory]:
        """The reward signals that the plugin offers."""
        offered: Mapping[str, ScorerFactory] | None = self.manager.hook.trimtab_branch_scorers()
        return offered or {}

    def launch(self, options: object, request: LaunchRequest) -> LaunchChange | None:
        """What the plugin changes of a training launch, for its block of options."""
        change: LaunchChange | None = self.manager.hook.trimtab_launch(
            config=self.configure(options), launch=request
        )
        return change

    def change_model(self, options: object, model: object, sequence_group: object) -> None:
        """Changes a model that is to be trained, for the plugin's block of options."""
        self.manager.hook.trimtab_training_model(
            config=self.configure(options), model=model, sequence_group=sequence_group
        )

    def look_inside(self) -> None:
        """Lets the plugin look at the training job that this process is a rank of."""
        self.manager.hook.trimtab_first_step()

    def configure(self, options: object) -> BaseModel:
        """Validates the plugin's block of options.

        Raises:
            BadInput: it names the option, its value and what would be right.
        """
        from trimtab.core.documents import validate

        model = self.info.config
        if model is None:
            where = f"trimtab.{self.name}"
            raise BadInput(f"the plugin {self.name!r} takes no options", where=where)
        return validate(model, options, where=f"trimtab.{self.name}")


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """An installed plugin whose entry point does not import."""

    name: str
    entry_point: EntryPoint
    reason: str


def load(entry_point: EntryPoint) -> Plugin:
    """Imports a plugin and registers its hooks; raises whatever its import raises."""
    manager = pluggy.PluginManager("trimtab")
    manager.add_hookspecs(sys.modules[__name__])
    manager.register(entry_point.load(), entry_point.name)
    manager.check_pending()
    return Plugin(entry_point.name, entry_point, manager)


@cache
def discover() -> tuple[tuple[Plugin, ...], tuple[BrokenPlugin, ...]]:
    """The installed plugins in the order of their names, and those that do not import."""
    sound: list[Plugin] = []
    broken: list[BrokenPlugin] = []
    for entry_point in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        if any(plugin.name == entry_point.name for plugin in sound):
            continue
        try:
            sound.append(load(entry_point))
        except Exception as error:  # a broken plugin must not break the others
            broken.append(
                BrokenPlugin(entry_point.name, entry_point, f"{type(error).__name__}: {error}")
            )
    return tuple(sound), tuple(broken)


def plugin(name: str) -> Plugin:
    """The installed plugin of a name.

    Raises:
        BadInput: none has it, or it does not import.
    """
    sound, broken = discover()
    for candidate in sound:
        if candidate.name == name:
            return candidate
    for candidate_broken in broken:
        if candidate_broken.name == name:
            raise BadInput(
                f"the plugin {name!r} does not import ({candidate_broken.reason})",
                fix=f"reinstall trimtab-{name}",
            )
    names = ", ".join(p.name for p in sound) or "none"
    raise BadInput(f"no plugin {name!r} is installed", fix=f"installed are: {names}")
