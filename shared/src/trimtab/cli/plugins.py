"""``trimtab plugins``: what is installed, what it hooks into and how it is switched on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer
from pydantic import BaseModel

from trimtab.core.errors import TrimtabError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from rich.table import Table

    from trimtab.core.hooks import BrokenPlugin, Plugin


class Option(BaseModel):
    """A configuration key of a plugin; ``default`` is as a configuration file would write it."""

    key: str
    type: str
    required: bool
    default: object
    description: str


class Field(BaseModel):
    """What a client may say of a call."""

    key: str
    type: str
    header: str | None
    description: str


class SoundPlugin(BaseModel):
    """A plugin that imports."""

    name: str
    distribution: str
    version: str
    summary: str
    enable: str
    hooks: list[str]
    options: list[Option]
    call_fields: list[Field]


class UnsoundPlugin(BaseModel):
    """A plugin that does not import."""

    name: str
    distribution: str
    version: str
    reason: str


class Listing(BaseModel):
    """What ``trimtab plugins --json`` prints."""

    plugins: list[SoundPlugin]
    broken: list[UnsoundPlugin]


def plugins(
    json_: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """List the plugins found, their hooks and their options."""
    from trimtab.cli.console import chatter_on_stderr

    with chatter_on_stderr():
        found = listing()
    if json_:
        typer.echo(found.model_dump_json(indent=2))
    else:
        _print(found)


def listing() -> Listing:
    """All installed plugins, sound and broken."""
    from trimtab.core.hooks import discover

    sound: list[SoundPlugin] = []
    broken = [_unsound(found, found.reason) for found in discover()[1]]
    for found in discover()[0]:
        try:
            sound.append(_sound(found))
        except Exception as error:  # its hook raised: the others are still worth listing
            reason = f"{type(error).__name__}: {error}"
            broken.append(
                _unsound(found, str(error) if isinstance(error, TrimtabError) else reason)
            )
    return Listing(plugins=sound, broken=broken)


def _sound(plugin: Plugin) -> SoundPlugin:
    from trimtab.core.hooks import PluginInfo

    info = plugin.info
    if not isinstance(info, PluginInfo):
        raise TrimtabError("it does not implement trimtab_info")
    distribution, version = _origin(plugin)
    return SoundPlugin(
        name=plugin.name,
        distribution=distribution,
        version=version,
        summary=info.summary,
        enable=info.enable,
        hooks=plugin.hooks,
        options=options(info.config) if info.config else [],
        call_fields=[
            Field(
                key=f"trimtab.{name}",
                type=field.kind.__name__,
                header=field.header,
                description=field.description,
            )
            for name, field in info.call_fields.items()
        ],
    )


def _unsound(plugin: Plugin | BrokenPlugin, reason: str) -> UnsoundPlugin:
    distribution, version = _origin(plugin)
    return UnsoundPlugin(
        name=plugin.name, distribution=distribution, version=version, reason=reason
    )


def _origin(plugin: Plugin | BrokenPlugin) -> tuple[str, str]:
    distribution = plugin.entry_point.dist
    return (distribution.name, distribution.version) if distribution else ("unknown", "unknown")


def options(model: type[BaseModel], prefix: str = "") -> list[Option]:
    """The configuration keys of a model; those of models inside it by dotted names."""
    found: list[Option] = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += options(inner, f"{key}.")
        else:
            found.append(_option(key, field))
    return found


def _option(key: str, field: FieldInfo) -> Option:
    from pydantic_core import to_jsonable_python

    default = field.get_default(call_default_factory=True, validated_data={})
    kind = field.annotation
    return Option(
        key=key,
        type=kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", ""),
        required=field.is_required(),
        default=None if field.is_required() else to_jsonable_python(default, fallback=str),
        description=field.description or "",
    )


def _print(found: Listing) -> None:
    from rich.console import Group
    from rich.text import Text

    from trimtab.cli.console import print_out

    if not found.plugins and not found.broken:
        typer.echo("No plugin is installed; for example: pip install trimtab-urgency")
    for plugin in found.plugins:
        heading = Text.assemble(
            (plugin.name, "bold"), f"  {plugin.summary}  ({plugin.distribution} {plugin.version})"
        )
        facts = [f"enable  {plugin.enable}", f"hooks   {', '.join(plugin.hooks)}"]
        print_out(Group(heading, *(Text(f"  {fact}") for fact in facts), *_tables(plugin), ""))
    for broken in found.broken:
        heading = Text.assemble(
            (broken.name, "bold red"), f"  broken  ({broken.distribution} {broken.version})"
        )
        print_out(Group(heading, Text(f"  {broken.reason}"), ""))


def _tables(plugin: SoundPlugin) -> list[Table]:
    from rich.table import Table
    from rich.text import Text

    tables: list[Table] = []
    if plugin.options:
        table = Table("option", "type", "default", "what it does", box=None, pad_edge=True)
        for option in plugin.options:
            default = "required" if option.required else json.dumps(option.default)
            table.add_row(*map(Text, (option.key, option.type, default, option.description)))
        tables.append(table)
    if plugin.call_fields:
        table = Table("vllm_xargs", "type", "header", "what it says", box=None, pad_edge=True)
        for field in plugin.call_fields:
            table.add_row(
                *map(Text, (field.key, field.type, field.header or "", field.description))
            )
        tables.append(table)
    return tables
