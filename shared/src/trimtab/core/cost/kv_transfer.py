"""Moving the KV cache from a prefill replica to a decode replica."""

from __future__ import annotations

from trimtab.core.errors import BadInput


def kv_transfer_s(
    kv_bytes: float, bandwidth_bytes_per_s: float, latency_s: float = 0.0, *, links: int = 1
) -> float:
    """How long a request's KV cache takes over ``links`` equal links used at once.

    Raises:
        BadInput: the bandwidth or the number of links is not positive.
    """
    if not bandwidth_bytes_per_s > 0 or links < 1:
        raise BadInput(
            f"the KV cache goes over {links} links of {bandwidth_bytes_per_s} bytes/s",
            fix="give at least one link with a positive bandwidth",
        )
    return latency_s + kv_bytes / (links * bandwidth_bytes_per_s)


def exposed_transfer_s(transfer_s: float, prefill_s: float, layers: int) -> float:
    """What remains of a transfer after the prefill, when each layer is sent as soon as it is there.

    Args:
        transfer_s: of all layers.
        prefill_s: of all layers.
        layers: how many there are; 1 sends everything at the end.
    """
    return max(transfer_s / layers, transfer_s - prefill_s * (layers - 1) / layers)
