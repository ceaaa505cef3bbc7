"""Deadline-aware serving of multi-stage agent workflows (HexGen-Text2SQL, arXiv:2505.05286)."""
