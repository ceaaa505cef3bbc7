"""The DeepSpeed host: the ``"trimtab"`` block of its configuration, and its launcher.

Neither needs DeepSpeed to be installed.
"""

from trimtab.hosts.deepspeed.config import TrainingBlock, find, training_plugins

__all__ = ["TrainingBlock", "find", "training_plugins"]
