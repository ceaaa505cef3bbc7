"""How long a step takes on a GPU that nobody here has: a roofline with soft corner and overheads.

``t = c0 + ((F / (e_c · peak))^q + (B / (e_b · bandwidth))^q)^(1/q)`` per device, plus the
all-reduces of tensor parallelism. The hard roofline, ``max`` of both terms, is furthest off where
they are equal, at 64 to 512 tokens; the q-norm rounds that corner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from trimtab.core.cost.step import MeasuredStep, StepBatch, StepCost, fit_step_cost
from trimtab.core.cost.work import (
    ACTIVATION_BYTES,
    REFERENCE_KERNELS,
    ModelWork,
    Precision,
    WeightType,
)
from trimtab.core.devices import DeviceProfile, Dtype
from trimtab.core.errors import BadInput, Infeasible
from trimtab.core.model import ModelSpec

BF16 = Precision()

LINK_EFFICIENCY = 0.8
"""The share of a link's bandwidth that an all-reduce reaches, where it is below the constant's."""

RESERVED_BYTES = 4e9
"""Per device for activations, graphs and communication buffers."""


@dataclass(frozen=True, slots=True)
class RooflineConstants:
    """The constants that a calibration may move; the defaults are the untuned ones.

    Attributes:
        compute: share of the peak FLOP/s that matrix kernels reach (e_c).
        memory: share of the memory bandwidth that they reach (e_b).
        token_s: engine overhead for each token of a step.
        allreduce_latency_s: of one all-reduce inside a node.
        allreduce_bandwidth_bytes_per_s: bus bandwidth of an all-reduce inside a node, unless the
            device's links allow less.
        step_s: fixed time of a step of an 80-layer dense model; other models have it in proportion
            to the kernels that they launch.
        norm: q; infinity for the hard roofline.
    """

    compute: float = 0.75
    memory: float = 0.8
    token_s: float = 0.3e-6
    allreduce_latency_s: float = 12e-6
    allreduce_bandwidth_bytes_per_s: float = 300e9
    step_s: float = 2e-3
    norm: float = 1.4

    def calibrated(self, efficiency: float, step_s: float) -> RooflineConstants:
        """With both efficiencies multiplied, and another fixed time."""
        return replace(
            self, compute=self.compute * efficiency, memory=self.memory * efficiency, step_s=step_s
        )


DEFAULTS = RooflineConstants()

RAW = RooflineConstants(
    compute=1.0,
    memory=1.0,
    token_s=0.0,
    allreduce_latency_s=0.0,
    allreduce_bandwidth_bytes_per_s=math.inf,
    step_s=0.0,
    norm=math.inf,
)
"""The plain roofline: every device at its peak, whatever is slower hides the rest."""


@dataclass(frozen=True)
class Replica:
    """One copy of a model on equal devices.

    Attributes:
        model: its shape.
        device: each device's profile.
        tensor_parallel: devices that share each layer.
        pipeline_parallel: stages that share the layers evenly.
        precision: types of weights and cache.
        allreduces_per_layer: after attention and after the feed-forward network; one more where
            queries and keys are normalised over all heads, as MiniMax-M2 does.
    """

    model: ModelSpec
    device: DeviceProfile
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    precision: Precision = BF16
    allreduces_per_layer: int = 2

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1 or self.model.heads % self.tensor_parallel:
            raise BadInput(
                f"tensor parallelism is {self.tensor_parallel}",
                fix=f"give a divisor of {self.model.name}'s {self.model.heads} heads",
            )
        if not 1 <= self.pipeline_parallel <= self.model.layers:
            raise BadInput(
                f"pipeline parallelism is {self.pipeline_parallel}",
                fix=f"give 1 to {self.model.layers}, the layers of {self.model.name}",
            )

    @property
    def devices(self) -> int:
        """How many devices it has."""
        return self.tensor_parallel * self.pipeline_parallel

    @cached_property
    def model_work(self) -> ModelWork:
        """What its steps cost, before they are shared out."""
        return ModelWork.of(self.model, self.precision)

    @property
    def cache_copies(self) -> float:
        """How often the cache is stored when tensor parallelism exceeds the key-value heads."""
        heads = 1 if self.model.latent else self.model.kv_heads
        return max(1.0, self.tensor_parallel / heads)

    def kv_capacity_tokens(self, memory_utilization: float = 0.9) -> int:
        """Tokens whose keys and values fit beside the weights.

        Raises:
            Infeasible: the weights alone do not fit; it says how many devices would hold them.
        """
        per_device = self.device.memory_bytes * memory_utilization - RESERVED_BYTES
        room = per_device * self.devices - self.model_work.weight_bytes
        if room <= 0:
            need = self.model_work.weight_bytes
            enough = (
                f"{math.ceil(need / per_device)} devices" if per_device > 0 else "larger devices"
            )
            raise Infeasible(
                f"{self.model.name} has {need / 1e9:.0f} GB of weights and {self.devices} x"
                f" {self.device.name} hold {max(per_device, 0) * self.devices / 1e9:.0f} GB",
                relaxation=f"take {enough} or smaller weights",
            )
        return int(room / (self.model_work.cache_bytes_per_token * self.cache_copies))


@dataclass(frozen=True)
class Roofline:
    """The step times of a replica."""

    replica: Replica
    constants: RooflineConstants = DEFAULTS

    @property
    def pipeline_stages(self) -> int:
        """Stages that work at once, on different parts of the batch."""
        return self.replica.pipeline_parallel

    def seconds(self, batch: StepBatch) -> float:
        """How long until every sequence of a batch is one step further.

        With several pipeline stages, the batch is cut into as many micro-batches as there are
        stages, or sequences where those are fewer: then some stages idle, the bubble.
        """
        stages = self.replica.pipeline_parallel
        cuts = max(1, min(stages, batch.decodes + batch.prefills))
        part = batch if cuts == 1 else _part(batch, cuts)
        # A micro-batch passes all stages while the others follow it, one stage behind each.
        return self._pass_s(part) + (stages - 1) * self._hop_s(part)

    def _pass_s(self, batch: StepBatch) -> float:
        """One micro-batch through all layers."""
        constants, device = self.constants, self.replica.device
        tokens = batch.decodes + batch.prefill_tokens
        memory_s = self._bytes(batch) / (constants.memory * device.memory_bandwidth_bytes_per_s)
        compute_s = self._compute_s(batch) / constants.compute
        overhead_s = constants.step_s * self.replica.model_work.kernels / REFERENCE_KERNELS
        return (
            overhead_s
            + constants.token_s * tokens
            + _norm(compute_s, memory_s, constants.norm)
            + self._allreduce_s(tokens)
        )

    def _compute_s(self, batch: StepBatch) -> float:
        """At the device's peak."""
        work = self.replica.model_work.work(batch)
        device, precision = self.replica.device, self.replica.precision
        seconds = (
            work.weight_flops / compute_rate(device, precision.weights)
            + work.expert_flops / compute_rate(device, precision.experts)
            + work.attention_flops / compute_rate(device, "bf16")
        )
        return seconds / self.replica.tensor_parallel

    def _bytes(self, batch: StepBatch) -> float:
        """Through the memory of one device of each stage."""
        work = self.replica.model_work.work(batch)
        moved = (
            work.weight_bytes + work.cache_bytes * self.replica.cache_copies + work.activation_bytes
        )
        return moved / self.replica.tensor_parallel

    def _allreduce_s(self, tokens: int) -> float:
        """Two all-reduces of the residual stream in each layer; any more are of a few bytes."""
        ranks = self.replica.tensor_parallel
        if ranks == 1:
            return 0.0
        constants, model = self.constants, self.replica.model
        link = LINK_EFFICIENCY * self.replica.device.link_bandwidth_bytes_per_s
        bandwidth = constants.allreduce_bandwidth_bytes_per_s
        bandwidth = bandwidth if math.isinf(bandwidth) else min(bandwidth, link)
        payload = tokens * model.hidden * ACTIVATION_BYTES
        moved_s = 2 * 2 * (ranks - 1) / ranks * payload / bandwidth
        latency_s = self.replica.allreduces_per_layer * constants.allreduce_latency_s
        return model.layers * (latency_s + moved_s)

    def _hop_s(self, batch: StepBatch) -> float:
        """Activations from one stage to the next."""
        tokens = batch.decodes + batch.prefill_tokens
        payload = tokens * self.replica.model.hidden * ACTIVATION_BYTES
        constants, link = self.constants, self.replica.device.link_bandwidth_bytes_per_s
        if math.isinf(constants.allreduce_bandwidth_bytes_per_s):
            return 0.0
        return constants.allreduce_latency_s + payload / (LINK_EFFICIENCY * link)


def compute_rate(device: DeviceProfile, weights: WeightType) -> float:
    """Peak FLOP/s with weights of a type.

    Types that the device has no arithmetic for are widened to 16 bits on the way to it, and to 32
    where it lacks those too.

    Raises:
        BadInput: the device's profile has no peak rate for any of them.
    """
    rates = device.peak_flop_per_s
    candidates: tuple[Dtype, ...] = ("bf16", "fp16", "fp32")
    for dtype in (weights, *candidates):
        rate = getattr(rates, dtype, None)
        if rate:
            return float(rate)
    raise BadInput(f"{device.name} has no peak rate", fix="give bf16, fp16 or fp32 FLOP/s")


def to_step_cost(roofline: Roofline, *, max_batch: int = 256, max_tokens: int = 8192) -> StepCost:
    """The simulator's linear step cost that is nearest to a roofline.

    Least squares of relative errors over a grid of batches: decodes alone, prompt chunks alone, and
    both together.

    Args:
        roofline: of the replica.
        max_batch: sequences in the largest batch.
        max_tokens: prompt tokens in the largest step.
    """
    batches = [*_decode_grid(max_batch), *_prefill_grid(max_tokens)]
    batches += [
        StepBatch(d.decodes, d.kv_tokens, p.prefills, p.prefill_tokens, p.prefill_pairs)
        for d in _decode_grid(max_batch)
        for p in _prefill_grid(max_tokens)
    ]
    return fit_step_cost(MeasuredStep(b, roofline.seconds(b)) for b in batches)[0]


def _decode_grid(max_batch: int) -> list[StepBatch]:
    sizes = sorted({1, max(1, max_batch // 16), max(1, max_batch // 4), max_batch})
    return [StepBatch(decodes=b, kv_tokens=b * c) for b in sizes for c in (256, 1024, 4096)]


def _prefill_grid(max_tokens: int) -> list[StepBatch]:
    sizes = sorted({max(1, max_tokens // 2**k) for k in range(0, 7, 2)})
    return [StepBatch(prefills=1, prefill_tokens=n, prefill_pairs=n * n / 2) for n in sizes]


def _part(batch: StepBatch, cuts: int) -> StepBatch:
    """One of ``cuts`` equal micro-batches, rounded up."""
    return StepBatch(
        decodes=-(-batch.decodes // cuts),
        kv_tokens=-(-batch.kv_tokens // cuts),
        prefills=-(-batch.prefills // cuts),
        prefill_tokens=-(-batch.prefill_tokens // cuts),
        prefill_pairs=batch.prefill_pairs / cuts,
    )


def _norm(a: float, b: float, q: float) -> float:
    largest = max(a, b)
    if largest == 0 or math.isinf(q):
        return largest
    return float(largest * ((a / largest) ** q + (b / largest) ** q) ** (1 / q))
