"""HexGen-Text2SQL's settings (arXiv:2505.05286) on the simulator: its GPUs, traces and rivals."""

from trimtab.urgency.paper.cases import simulated_cases

__all__ = ["simulated_cases"]
