"""Whether sparse prefill pays on a GPU, told by the model of times; nothing of it was measured.

Dense attention by Triton is rated by what FSA's paper published for an H200; other GPUs are taken
for one, since where attention is slower what does not grow with the prompt weighs less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.kernels.sparse.block_sparse import TILE
from trimtab.kernels.sparse.paged_prefill import segments
from trimtab.kernels.sparse.prefill import LEAST_GAIN, expected_share
from trimtab.kernels.sparse.selectors import Selection
from trimtab.sparse.performance_model import GPUS, LAUNCH_S, model
from trimtab.sparse.published_figures import HEAD_SIZE, HEADS, Run

if TYPE_CHECKING:
    from trimtab.hosts.vllm.prefills import LayerShape

_GPU = "h200"
_TOKENS = 128 * 1024

_FLASH_2 = 1.26
"""FlashAttention-2's speed where Triton's is 1: 3.84 ms to 3.04 ms at 8K tokens on an H100, as
native-sparse-attention-triton published."""
_FLASH_3 = 2.0 * _FLASH_2
"""At most twice that (arXiv 2407.08608); also for newer GPUs, of which nothing is known here."""
_FLASH_2_GENERATION = 8

_EFFICIENCY = 0.8
"""Our kernel's speed on a kept block where dense attention by Triton is 1: what `sparse-static`
counts of tensor instructions in both on sm_80."""

_LAUNCHES = 40
"""Kernels of one segment: the estimate, the choice in torch, and attention."""
_SAMPLE_BYTES = 24
"""Memory traffic for each sampled query and block: written, and a softmax over them."""
_KEY_BYTES = 6
"""For each number of the keys in a segment, where they are pooled or folded in torch."""
_CHOICE_BYTES = 200
"""For each tile and block: two sorts, a sum and the lists."""


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """What a prefill is predicted to take in one layer."""

    path: str
    """``dense`` or ``sparse``."""
    dense_s: float
    sparse_s: float
    beneath: str
    """What does the dense attention."""

    @property
    def chosen_s(self) -> float:
        """Of the path that was chosen."""
        return self.dense_s if self.path == "dense" else self.sparse_s

    def explain(self) -> str:
        """One sentence: the path and the figures behind it."""
        return (
            f"{self.path}: predicted {1e3 * self.sparse_s:.2f} ms a layer, and"
            f" {1e3 * self.dense_s:.2f} ms by {self.beneath}"
        )


def flash_speed(layers: LayerShape) -> float:
    """Speed of the dense attention beneath, where Triton's is 1; never rated too low."""
    if layers.dense != "FLASH_ATTN":
        return 1.0
    return _FLASH_2 if layers.generation == _FLASH_2_GENERATION else _FLASH_3


def plan_on_gpu(queries: int, keys: int, layers: LayerShape, selection: Selection) -> GpuPlan:
    """Chooses between the dense attention beneath and ours, for one layer.

    Args:
        queries: new tokens, the last of ``keys``.
        keys: tokens of the sequence.
        layers: the layers.
        selection: which blocks are kept.
    """
    pairs = queries * (keys - queries / 2)
    triton_s = _triton_s(pairs, layers)
    dense_s = triton_s / flash_speed(layers)
    attended = triton_s * expected_share(queries, keys, selection) / _EFFICIENCY
    sparse_s = attended + _choice_s(queries, keys, layers, selection, triton_s)
    path = "sparse" if dense_s >= LEAST_GAIN * sparse_s else "dense"
    return GpuPlan(path, dense_s, sparse_s, layers.dense)


def _triton_s(pairs: float, layers: LayerShape) -> float:
    published = model(_GPU).forward_s("dense", Run(_GPU, _TOKENS, 1, TILE, 16))
    size = layers.heads * layers.head_size / (HEADS * HEAD_SIZE)
    return published * pairs / (_TOKENS**2 / 2) * size


def _choice_s(
    queries: int, keys: int, layers: LayerShape, selection: Selection, triton_s: float
) -> float:
    """Of the estimate and the choice."""
    step = selection.sample_step
    products = 0.0 if step is None else triton_s / 2 / step / _EFFICIENCY
    samples = queries / (step or 1)
    traffic = samples * _SAMPLE_BYTES + queries / TILE * _CHOICE_BYTES
    moved = layers.heads * keys / TILE * traffic / GPUS[_GPU].memory_bytes_per_s
    calls = len(list(segments(queries, layers.heads, keys - queries, selection)))
    if step is None:
        read = keys * layers.kv_heads * layers.head_size * _KEY_BYTES
        moved += calls * read / GPUS[_GPU].memory_bytes_per_s
    return products + moved + calls * _LAUNCHES * LAUNCH_S
