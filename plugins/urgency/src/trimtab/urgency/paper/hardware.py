"""The paper's mixed clusters: what a 70B model takes on each GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.core.cost.step import EngineLimits, EngineProfile, StepCost
from trimtab.core.simulate import ReplicaSpec

SEATS = 8
"""Calls that a replica runs at once if nothing else is said."""
CROWDING = 0.02
"""Share by which each further sequence lengthens a decode step."""
_BLOCK = 16
_WEIGHTS_GB = 35.0
_KV_BYTES_PER_TOKEN = 80 * 8 * 128 * 2 // 2
"""Of 80 layers with 8 heads of 128 for keys and for values, 4 bits each."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A replica of Llama-3.1-70B on one kind of GPU.

    The two rates are least-squares fits to the seconds per stage type that the paper's programme
    states for each GPU.
    """

    name: str
    prefill_s_per_token: float
    decode_s_per_token: float
    memory_gb: float

    def prefill_s(self, prompt_tokens: int) -> float:
        """The prompt's time."""
        return self.prefill_s_per_token * prompt_tokens

    def decode_s(self, output_tokens: float) -> float:
        """The output's time, with nothing else in the batch."""
        return self.decode_s_per_token * output_tokens

    def replica(self, seats: int = SEATS) -> ReplicaSpec:
        """The replica as the simulator takes it; a prompt is computed in one step, as published."""
        kv_bytes = (0.95 * self.memory_gb - _WEIGHTS_GB) * 1e9
        limits = EngineLimits(
            max_num_seqs=seats,
            max_num_batched_tokens=16_384,
            max_model_len=32_768,
            block_size=_BLOCK,
            kv_blocks=int(kv_bytes / _KV_BYTES_PER_TOKEN / _BLOCK),
            prefix_caching=False,
        )
        step = StepCost(
            base_s=(1 - CROWDING) * self.decode_s_per_token,
            decode_s=CROWDING * self.decode_s_per_token,
            prefill_token_s=self.prefill_s_per_token,
        )
        return ReplicaSpec(
            EngineProfile(
                model="Llama-3.1-70B-Instruct",
                device=self.name,
                engine="as published",
                limits=limits,
                step=step,
            )
        )


A100 = Gpu("A100", 0.330e-3, 21.2e-3, 80)
A6000 = Gpu("A6000", 0.966e-3, 33.8e-3, 48)
L40S = Gpu("L40S", 0.576e-3, 38.2e-3, 48)

Cluster = tuple[Gpu, ...]

CLUSTERS: Mapping[str, Cluster] = {
    "a100x2-a6000-l40s": (A100, A100, A6000, L40S),
    "a100x2-a6000x2": (A100, A6000, A100, A6000),
}
