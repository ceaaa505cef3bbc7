"""Compiles the CPU kernels for each set of instructions; without a compiler they are left out."""

from __future__ import annotations

import platform

from setuptools import Extension, setup

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_X86 = {"avx512bf16": [*_AVX512, "-mavx512bf16"], "avx512": _AVX512, "avx2": _AVX2}
_SETS = {**(_X86 if platform.machine() in ("x86_64", "AMD64") else {}), "portable": []}

_BUILDS = [
    *(("block_sparse", name) for name in _SETS),
    *(("block_lists", name) for name in _SETS if name != "avx512bf16"),  # it has no use for it
]

setup(
    ext_modules=[
        Extension(
            f"trimtab.kernels.sparse.{source}_{name}",
            [f"src/trimtab/kernels/sparse/{source}.cpp"],
            depends=["src/trimtab/kernels/sparse/vectors.hpp"],
            extra_compile_args=[
                *("-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden"),
                *_SETS[name],
            ],
            optional=True,
        )
        for source, name in _BUILDS
    ]
)
