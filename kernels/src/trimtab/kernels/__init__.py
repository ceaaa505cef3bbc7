"""Kernels of trimtab's plugins, each beside the same mathematics in plain torch."""
