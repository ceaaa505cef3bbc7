"""The torch host: backends of torch.distributed that plugins bring, and torchrun.

``import torch`` imports this package, so it must stay as empty as it is.
"""
