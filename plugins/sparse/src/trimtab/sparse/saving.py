"""Models with native sparse attention, to a folder and back; vLLM serves them out of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.core.documents import validate
from trimtab.core.errors import BadInput
from trimtab.sparse.config import NativeConfig
from trimtab.sparse.native import NAME, NativeAttention, use_native_attention

ARCHITECTURE = "TrimtabNativeLlamaForCausalLM"
CONFIG_KEY = "trimtab_native"
"""Where ``config.json`` says which native sparse attention it is."""

MODEL_TYPES = ("llama", "mistral", "qwen2")
"""Whose decoder layers are Llama's but for attention."""


def save_native_model(model: nn.Module, folder: str | Path, **options: Any) -> None:
    """Saves a transformers model that `use_native_attention` has changed, so that vLLM serves it.

    Its tokenizer is saved as ever. ``config.json`` names an attention that transformers does not
    know, so that ``from_pretrained`` refuses the folder instead of reading a dense model from it.

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
        "attn_implementation": NAME,
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
        BadInput: there is none in the folder, or weights are missing, or too many, or of other
            sizes than the options or ``config.json`` say.
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
    model: nn.Module = auto.from_config(config, dtype=config.dtype, attn_implementation="sdpa")
    use_native_attention(model, native)
    paths = sorted(Path(folder).glob("*.safetensors"))
    _check(model, _sizes(paths), Path(folder))
    for path in paths:
        model.load_state_dict(load_file(path), strict=False)
    return model.eval()


Size = tuple[int, ...]


def _sizes(paths: Iterable[Path]) -> dict[str, Size]:
    """Of all weights in files, by their names."""
    from safetensors import safe_open

    found: dict[str, Size] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def _check(model: nn.Module, saved: Mapping[str, Size], folder: Path) -> None:
    """Refuses weights that are not the model's, naming the option that would make them so."""
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    config: Any = model.config
    tied = (
        set(getattr(model, "_tied_weights_keys", None) or ())
        if config.tie_word_embeddings
        else set()
    )
    missing = sorted(expected.keys() - saved.keys() - tied)
    unknown = sorted(saved.keys() - expected.keys() - tied)
    other = sorted(name for name in expected.keys() & saved.keys() if expected[name] != saved[name])
    if not (missing or unknown or other):
        return
    for option, given, made_with in _options_of(model, saved):
        if given != made_with:
            raise BadInput(
                f"{option} is {given!r}, but the weights beside it were made with {made_with!r}",
                where=f"{folder / 'config.json'}: {CONFIG_KEY}",
                fix=f"give {made_with!r}",
            )
    if other:
        name = other[0]
        what = f"{name} is {list(saved[name])}, and config.json makes it {list(expected[name])}"
    else:
        names = ", ".join((missing or unknown)[:3])
        what = f"there are no weights for {names}" if missing else f"no layer takes {names}"
    raise BadInput(
        what, where=str(folder), fix="save the model by trimtab.sparse.saving.save_native_model"
    )


def _options_of(
    model: nn.Module, saved: Mapping[str, Size]
) -> Iterator[tuple[str, object, object]]:
    """The options that weights tell of: name, what is configured, what they were made with.

    Of the first layer of which there are weights; the others' are alike.
    """
    for prefix, layer in model.named_modules():
        if isinstance(layer, NativeAttention) and f"{prefix}.gate_proj.bias" in saved:
            own = {n.removeprefix(f"{prefix}."): size for n, size in saved.items()}
            break
    else:
        return
    config = layer.config
    gates = own["gate_proj.bias"]
    known = tuple(layer.gate_proj.bias.shape)
    yield (
        "gate",
        config.gate,
        config.gate if gates == known else "token" if gates == (3,) else "head",
    )
    maps = {"compress_k.weight_out": "mlp", "compress_k.weight": "linear"}
    made = next((kind for name, kind in maps.items() if name in own), "mean")
    yield "compress", config.compress, made
    yield "window", config.window, own.get("compress_k.position", (config.window,))[0]
    others = any(name.startswith("other_kv.") for name in own)
    yield "kv_per_branch", config.kv_per_branch, others
