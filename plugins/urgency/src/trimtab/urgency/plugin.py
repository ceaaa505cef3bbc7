"""The plugin's hooks: what trimtab finds under the name ``urgency``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.hooks import PluginInfo, hookimpl
from trimtab.urgency.config import UrgencyConfig
from trimtab.urgency.fields import FIELDS

if TYPE_CHECKING:
    from trimtab.core.policy import ServingPolicy


@hookimpl
def trimtab_info() -> PluginInfo:
    """Says what the plugin is, and how it is switched on."""
    return PluginInfo(
        summary="serves multi-stage agent workflows by their deadlines",
        enable='--additional-config \'{"trimtab": {"urgency": {}}}\'',
        config=UrgencyConfig,
        call_fields=FIELDS,
    )


@hookimpl
def trimtab_serving_policy(config: UrgencyConfig) -> ServingPolicy:
    """Makes the policy that orders the waiting calls."""
    from trimtab.urgency.policy import UrgencyPolicy

    return UrgencyPolicy(config)
