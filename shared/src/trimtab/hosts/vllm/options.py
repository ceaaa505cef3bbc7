"""What the user switched on: the ``"trimtab"`` block of vLLM's ``--additional-config``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from trimtab.core.hooks import discover, plugin
from trimtab.core.policy import CallField, ServingPolicy
from trimtab.hosts import block


def enabled(additional_config: object) -> dict[str, object]:
    """The plugins' blocks of options by plugin name, in the user's order.

    Raises:
        BadInput: the block is not a mapping from plugins' names to their options.
    """
    return block.enabled(additional_config, where="--additional-config")


def policies(additional_config: object) -> list[tuple[str, ServingPolicy]]:
    """The policies of the enabled plugins that have one, with the plugins' names.

    Raises:
        BadInput: a plugin is not installed or its options are wrong.
    """
    found = (
        (name, plugin(name).serving_policy(options))
        for name, options in enabled(additional_config).items()
    )
    return [(name, policy) for name, policy in found if policy is not None]


@cache
def call_fields() -> Mapping[str, CallField]:
    """The call fields of all installed plugins by name."""
    fields: dict[str, CallField] = {}
    for found in discover()[0]:
        fields.update(found.info.call_fields)
    return fields
