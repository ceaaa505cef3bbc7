"""The plugin's hooks: what trimtab finds under the name ``branches``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.branches.config import BranchesConfig
from trimtab.branches.fields import FIELDS
from trimtab.core.hooks import PluginInfo, hookimpl

if TYPE_CHECKING:
    from trimtab.core.policy import ServingPolicy


@hookimpl
def trimtab_info() -> PluginInfo:
    """Says what the plugin is, and how it is switched on."""
    return PluginInfo(
        summary="samples several branches of a request, stops early and prunes the bad ones",
        enable='--additional-config \'{"trimtab": {"branches": {}}}\'',
        config=BranchesConfig,
        call_fields=FIELDS,
    )


@hookimpl
def trimtab_serving_policy(config: BranchesConfig) -> ServingPolicy:
    """Makes the policy that ends branches."""
    from trimtab.branches.policy import BranchesPolicy

    return BranchesPolicy(config)
