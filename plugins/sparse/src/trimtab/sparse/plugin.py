"""The plugin's hooks: what trimtab finds under the name ``sparse``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimtab.core.hooks import PluginInfo, hookimpl
from trimtab.sparse.config import SparseConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trimtab.core.benchmark import Benchmark, Case, Options, Progress


@hookimpl
def trimtab_info() -> PluginInfo:
    """Says what the plugin is, and how it is switched on."""
    return PluginInfo(
        summary="fills in long prompts, and trains, by attending to the blocks that matter",
        enable='--additional-config \'{"trimtab": {"sparse": {}}}\', or the same block in the'
        " DeepSpeed configuration",
        config=SparseConfig,
    )


@hookimpl
def trimtab_training_model(config: SparseConfig, model: Any, sequence_group: Any) -> None:
    """Gives the model native sparse attention, unless the script did so itself."""
    from trimtab.sparse.native import use_native_attention
    from trimtab.sparse.nsa import NSAAttention

    if not any(isinstance(layer, NSAAttention) for layer in model.modules()):
        use_native_attention(model, config.native, sequence_group)


@hookimpl
def trimtab_benchmarks() -> Sequence[Benchmark]:
    """The benchmarks; what they need is imported when they run."""
    from trimtab.core.benchmark import Benchmark

    def sparse(options: Options, progress: Progress) -> list[Case]:
        from trimtab.sparse import bench

        return bench.run(options, progress)

    def static(options: Options, progress: Progress) -> list[Case]:
        from trimtab.sparse import static_bench

        return static_bench.run(options, progress)

    def on_gpu(options: Options, progress: Progress) -> list[Case]:
        from trimtab.sparse import gpu_bench

        return gpu_bench.run(options, progress)

    return [
        Benchmark("sparse", "sparse prefill on the CPU: speed, quality, a server's TTFT", sparse),
        Benchmark("sparse-static", "the sparse GPU kernels' resources, without a GPU", static),
        Benchmark(
            "sparse-gpu", "the sparse GPU kernels' times on a GPU, and their model's", on_gpu
        ),
    ]
