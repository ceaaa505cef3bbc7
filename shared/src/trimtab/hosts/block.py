"""The ``"trimtab"`` block that every framework's configuration may hold."""

from __future__ import annotations

from collections.abc import Mapping

from trimtab.core.errors import BadInput

KEY = "trimtab"


def enabled(config: object, *, where: str) -> dict[str, object]:
    """The plugins' blocks of options by plugin name, in the user's order.

    Args:
        config: the whole configuration; anything but a mapping has no block.
        where: the file or argument that it comes from.

    Raises:
        BadInput: the block is not a mapping from plugins' names to their options.
    """
    block = config.get(KEY, {}) if isinstance(config, Mapping) else {}
    if not isinstance(block, Mapping):
        raise BadInput(
            f"it is a {type(block).__name__}",
            where=f"{where}, {KEY}",
            fix='give a mapping such as {"trimtab": {"PLUGIN": {}}}',
        )
    return dict(block)
