"""Models with native sparse attention, to a folder and back; vLLM serves them out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.core.documents import validate
from trimtab.core.errors import BadInput
from trimtab.sparse.config import NativeConfig
from trimtab.sparse.native import NativeAttention, use_native_attention

ARCHITECTURE = "TrimtabNativeLlamaForCausalLM"
CONFIG_KEY = "trimtab_native"
"""Where ``config.json`` says which native sparse attention it is."""

MODEL_TYPES = ("llama", "mistral", "qwen2")
"""Whose decoder layers are Llama's but for attention."""


def save_native_model(model: nn.Module, folder: str | Path, **options: Any) -> None:
    """Saves a transformers model that `use_native_attention` has changed, so that vLLM serves it.

    Its tokenizer is saved as ever.

    Args:
        model: of transformers, with a head for language; not DeepSpeed's engine around it.
        folder: to write ``config.json`` and the weights to.
        options: for ``model.save_pretrained``: under ZeRO-3 ``state_dict`` and ``is_main_process``.

    Raises:
        BadInput: the model has no native sparse attention, or vLLM could not serve it.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, NativeAttention)]
    configs = {layer.config for layer in layers}
    config: Any = getattr(model, "config", None)
    faults = {
        "has no native sparse attention": not layers,
        "has native sparse attention of several kinds": len(configs) > 1,
        "is no model of transformers": not hasattr(model, "save_pretrained"),
        f"is of the type {getattr(config, 'model_type', None)}": getattr(config, "model_type", "")
        not in MODEL_TYPES,
        "has no head for language": not hasattr(model, "lm_head"),
    }
    for fault, found in faults.items():
        if found:
            raise BadInput(
                f"{type(model).__name__} {fault}, so that vLLM could not serve it",
                fix=f"give a {' or '.join(MODEL_TYPES)} model after use_native_attention(model)",
            )
    save: Any = getattr(model, "save_pretrained")  # noqa: B009
    save(folder, **options)
    if not options.get("is_main_process", True):
        return
    path = Path(folder) / "config.json"
    written = json.loads(path.read_text())
    written |= {
        "architectures": [ARCHITECTURE],
        "attention_bias": layers[0].o_proj.bias is not None,
        "qkv_bias": layers[0].q_proj.bias is not None,
        CONFIG_KEY: configs.pop().model_dump(mode="json"),
    }
    path.write_text(json.dumps(written, indent=2) + "\n")


def native_config(config: Any) -> NativeConfig:
    """What a saved model's configuration, read by transformers, says of its attention.

    Raises:
        BadInput: it says nothing, or something wrong.
    """
    options = getattr(config, CONFIG_KEY, None)
    if options is None:
        raise BadInput(
            "the model has no native sparse attention",
            where=f"config.json: {CONFIG_KEY}",
            fix="save it by trimtab.sparse.saving.save_native_model",
        )
    return validate(NativeConfig, options, where=f"config.json: {CONFIG_KEY}")


def load_native_model(folder: str | Path) -> nn.Module:
    """The transformers model that `save_native_model` has saved, to train on or compare with.

    Raises:
        BadInput: there is none in the folder, or weights are missing.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (Path(folder) / "config.json").is_file():
        raise BadInput(
            "there is no config.json", where=str(folder), fix="give the folder of a saved model"
        )
    auto: Any = AutoModelForCausalLM
    config = AutoConfig.from_pretrained(folder)
    native = native_config(config)
    model: nn.Module = auto.from_config(config, dtype=config.dtype)
    use_native_attention(model, native)
    missing = set(model.state_dict()) - set(getattr(model, "_tied_weights_keys", None) or ())
    for path in sorted(Path(folder).glob("*.safetensors")):
        weights = load_file(path)
        model.load_state_dict(weights, strict=False)
        missing -= set(weights)
    if missing:
        raise BadInput(
            f"there are no weights for {', '.join(sorted(missing)[:3])}",
            where=str(folder),
            fix="save the model by trimtab.sparse.saving.save_native_model",
        )
    return model.eval()
