"""Native sparse attention in a DeepSpeed job whose configuration asks for it.

Nothing of DeepSpeed is imported: the model is changed before ``deepspeed.initialize`` sees it.
"""

from __future__ import annotations

import sys

from torch import nn

from trimtab.core.documents import validate
from trimtab.core.errors import BadInput
from trimtab.hosts.block import KEY
from trimtab.hosts.deepspeed import find
from trimtab.hosts.deepspeed.config import TrainingBlock, read_given
from trimtab.sparse.config import SparseConfig
from trimtab.sparse.native import use_native_attention

PLUGIN = "sparse"


def configured(config: object = None) -> SparseConfig | None:
    """The plugin's options in a DeepSpeed configuration.

    Args:
        config: a mapping, the path of a file, or base64 text; by default, what this process'
            arguments name (``--deepspeed_config``).

    Returns:
        None where the configuration does not switch the plugin on.

    Raises:
        BadInput: the configuration is malformed, or an option is wrong.
    """
    block = find(sys.argv[1:]) if config is None else read_given(config)
    if block is None or PLUGIN not in block.plugins:
        return None
    return _options(block)


def _options(block: TrainingBlock) -> SparseConfig:
    try:
        return validate(SparseConfig, block.plugins[PLUGIN], where=f"{KEY}.{PLUGIN}")
    except BadInput as error:
        raise BadInput(error.what, where=f"{block.where}, {error.where}", fix=error.fix) from None


def prepare(model: nn.Module, config: object = None) -> bool:
    """Gives a transformers model native sparse attention, if the configuration says so.

    To be called before the optimizer is made and before ``deepspeed.initialize``. With ZeRO-3 the
    model must not be built under ``deepspeed.zero.Init``.

    Args:
        model: of transformers; see `use_native_attention`.
        config: see `configured`.

    Returns:
        Whether the model was changed.

    Raises:
        BadInput: the configuration or the model is wrong.
    """
    options = configured(config)
    if options is None:
        return False
    use_native_attention(model, options.native)
    return True
