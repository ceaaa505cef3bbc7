"""The plugin's hooks: what trimtab finds under the name ``sparse``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.hooks import PluginInfo, hookimpl
from trimtab.sparse.config import SparseConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trimtab.core.benchmark import Benchmark, Case, Options, Progress
    from trimtab.core.launch import LaunchChange, LaunchRequest


@hookimpl
def trimtab_info() -> PluginInfo:
    """Says what the plugin is, and how it is switched on."""
    return PluginInfo(
        summary="fills in long prompts, and trains, by attending to the blocks that matter",
        enable='--additional-config \'{"trimtab": {"sparse": {}}}\', or the same block in the'
        " DeepSpeed configuration and trimtab.sparse.in_deepspeed.prepare(model)",
        config=SparseConfig,
    )


@hookimpl
def trimtab_launch(config: SparseConfig, launch: LaunchRequest) -> LaunchChange | None:
    """Changes nothing of a launch: its options are checked, and the job reads them itself."""
    del config, launch
    return None


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

    return [
        Benchmark("sparse", "sparse prefill on the CPU: speed, quality, a server's TTFT", sparse),
        Benchmark("sparse-static", "the sparse GPU kernels' resources, without a GPU", static),
    ]
