"""Model shapes from Hugging Face configs: one small function for what each family adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from trimtab.core.documents import (
    InvalidValue,
    LineMap,
    json_lines,
    parse_json,
    place,
    read_text,
    shown,
    validate,
)
from trimtab.core.errors import BadInput, Unsupported
from trimtab.core.model import Experts, LatentAttention, ModelSpec

_DTYPE_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "float8_e4m3fn": 1.0}
# MXFP4: four bits and one shared 8-bit scale for each 32 weights (OCP Microscaling v1.0).
_QUANTISED_BYTES = {"fp8": 1.0, "mxfp4": 4.25 / 8}


class _Config(BaseModel):
    """The keys of ``config.json`` that some family uses; the others are left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: str
    num_hidden_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    tie_word_embeddings: bool = False
    max_position_embeddings: PositiveInt = 4096
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: PositiveInt | None = None
    use_sliding_window: bool = False
    max_window_layers: NonNegativeInt = 0
    layer_types: list[str] | None = None
    sliding_window_pattern: PositiveInt = 6
    num_experts: PositiveInt | None = None
    num_local_experts: PositiveInt | None = None
    n_routed_experts: PositiveInt | None = None
    n_shared_experts: NonNegativeInt | None = None
    num_experts_per_tok: PositiveInt | None = None
    moe_intermediate_size: PositiveInt | None = None
    shared_expert_intermediate_size: NonNegativeInt = 0
    decoder_sparse_step: PositiveInt = 1
    mlp_only_layers: list[int] = Field(default_factory=list)
    first_k_dense_replace: NonNegativeInt = 0
    moe_layer_freq: PositiveInt = 1
    topk_method: str | None = None
    q_lora_rank: PositiveInt | None = None
    kv_lora_rank: PositiveInt | None = None
    qk_nope_head_dim: PositiveInt | None = None
    qk_rope_head_dim: PositiveInt | None = None
    v_head_dim: PositiveInt | None = None
    torch_dtype: str | None = None
    dtype: str | None = None
    quantization_config: dict[str, Any] | None = None


def spec_from_hf(config: str | Path | Mapping[str, Any], *, name: str = "") -> ModelSpec:
    """The shape that a Hugging Face config describes; see `ModelSpec.from_hf`."""
    if isinstance(config, Mapping):
        return _spec(config, "config.json", None, name)
    path = Path(config)
    if path.is_dir():
        path = path / "config.json"
    text = read_text(path)
    data = parse_json(text, where=str(path), finite=False)
    return _spec(data, str(path), json_lines(text), name or path.resolve().parent.name)


def _spec(data: Any, where: str, lines: LineMap | None, name: str) -> ModelSpec:
    family = _family(data, where, lines)
    config = validate(_Config, data, where=where, lines=lines)
    try:
        shape = _plain(config) | family(config)
    except InvalidValue as error:
        raise BadInput(error.what, where=place(where, error.at, lines), fix=error.fix) from None
    shape["name"] = name or str(data.get("_name_or_path") or config.model_type)
    return validate(ModelSpec, shape, where=where)


def _family(data: Any, where: str, lines: LineMap | None) -> Callable[[_Config], dict[str, Any]]:
    model_type = data.get("model_type") if isinstance(data, Mapping) else None
    if not isinstance(model_type, str):
        raise BadInput(
            "there is no model_type",
            where=where,
            fix="give the config.json of a Hugging Face language model",
        )
    if model_type not in _FAMILIES:
        raise Unsupported(
            f"the architecture {shown(model_type)} is not known",
            where=place(where, ("model_type",), lines),
            fix=f"known are {', '.join(sorted(_FAMILIES))}",
        )
    return _FAMILIES[model_type]


def _plain(config: _Config) -> dict[str, Any]:
    """What all families have in common."""
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": config.head_dim or max(1, config.hidden_size // config.num_attention_heads),
        "intermediate": config.intermediate_size,
        "vocab": config.vocab_size,
        "tied_embeddings": bool(config.tie_word_embeddings),
        "dtype_bytes": _dtype_bytes(config),
        "max_positions": config.max_position_embeddings,
    }


def _dtype_bytes(config: _Config) -> float:
    quantised = config.quantization_config or {}
    method, bits = quantised.get("quant_method"), quantised.get("bits")
    if method in _QUANTISED_BYTES:
        return _QUANTISED_BYTES[method]
    if isinstance(bits, int) and 0 < bits <= 16:
        return bits / 8
    return _DTYPE_BYTES.get(config.torch_dtype or config.dtype or "bfloat16", 2.0)


def _llama(config: _Config) -> dict[str, Any]:
    return {
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _mistral(config: _Config) -> dict[str, Any]:
    return _sliding(config, range(config.num_hidden_layers))


def _qwen2(config: _Config) -> dict[str, Any]:
    return {"qkv_bias": True} | _qwen_window(config)


def _qwen3(config: _Config) -> dict[str, Any]:
    return _llama(config) | {"qk_norm": True} | _qwen_window(config)


def _qwen_window(config: _Config) -> dict[str, Any]:
    if not config.use_sliding_window:
        return {}
    return _sliding(config, range(config.max_window_layers, config.num_hidden_layers))


def _qwen2_moe(config: _Config) -> dict[str, Any]:
    return _qwen2(config) | {"experts": _qwen_experts(config, shared_gate=True)}


def _qwen3_moe(config: _Config) -> dict[str, Any]:
    return _qwen3(config) | {"experts": _qwen_experts(config, shared_gate=False)}


def _qwen_experts(config: _Config, *, shared_gate: bool) -> Experts:
    step = config.decoder_sparse_step
    dense = set(config.mlp_only_layers)
    dense |= {layer for layer in range(config.num_hidden_layers) if (layer + 1) % step}
    return Experts(
        count=_needed(config, "num_experts"),
        active=_needed(config, "num_experts_per_tok"),
        intermediate=_needed(config, "moe_intermediate_size"),
        shared_intermediate=config.shared_expert_intermediate_size,
        shared_gate=shared_gate and config.shared_expert_intermediate_size > 0,
        dense_layers=frozenset(dense),
    )


def _mixtral(config: _Config) -> dict[str, Any]:
    experts = Experts(
        count=_needed(config, "num_local_experts"),
        active=_needed(config, "num_experts_per_tok"),
        intermediate=config.intermediate_size,
    )
    return {"experts": experts} | _sliding(config, range(config.num_hidden_layers))


def _deepseek(config: _Config) -> dict[str, Any]:
    """DeepSeek-V2 and V3; the draft (MTP) layers behind the last one are left out."""
    shape: dict[str, Any] = {
        "latent": LatentAttention(
            q_rank=config.q_lora_rank,
            kv_rank=_needed(config, "kv_lora_rank"),
            nope_dim=_needed(config, "qk_nope_head_dim"),
            rope_dim=_needed(config, "qk_rope_head_dim"),
            value_dim=_needed(config, "v_head_dim"),
        )
    }
    if config.n_routed_experts is None:
        return shape
    intermediate = _needed(config, "moe_intermediate_size")
    first, step = config.first_k_dense_replace, config.moe_layer_freq
    dense = {layer for layer in range(config.num_hidden_layers) if layer < first or layer % step}
    shape["experts"] = Experts(
        count=config.n_routed_experts,
        active=_needed(config, "num_experts_per_tok"),
        intermediate=intermediate,
        shared_intermediate=(config.n_shared_experts or 0) * intermediate,
        router_bias=config.topk_method == "noaux_tc",
        dense_layers=frozenset(dense),
    )
    return shape


def _gemma(config: _Config) -> dict[str, Any]:
    # The family's configs leave out what is true of all its models.
    stated = config.model_fields_set
    return {
        "tied_embeddings": config.tie_word_embeddings or "tie_word_embeddings" not in stated,
        "head_dim": config.head_dim or 256,
    }


def _gemma2(config: _Config) -> dict[str, Any]:
    sliding = range(0, config.num_hidden_layers, 2)
    return _gemma(config) | {"norms_per_layer": 4} | _sliding(config, sliding)


def _gemma3(config: _Config) -> dict[str, Any]:
    every = config.sliding_window_pattern
    sliding = [layer for layer in range(config.num_hidden_layers) if (layer + 1) % every]
    shape = _gemma(config) | {"norms_per_layer": 4, "qk_norm": True}
    return shape | _sliding(config, sliding)


def _gpt_oss(config: _Config) -> dict[str, Any]:
    shape = _llama(config) | {
        "mlp_bias": True,
        "attention_sinks": True,
        "experts": Experts(
            count=_needed(config, "num_local_experts"),
            active=_needed(config, "num_experts_per_tok"),
            intermediate=config.intermediate_size,
            router_bias=True,
        ),
    }
    return shape | _sliding(config, range(0, config.num_hidden_layers, 2))


def _sliding(config: _Config, layers: Iterable[int]) -> dict[str, Any]:
    """The sliding layers: what ``layer_types`` says, else what the family does by itself."""
    if config.sliding_window is None:
        return {}
    if config.layer_types is not None:
        kinds = enumerate(config.layer_types)
        layers = [layer for layer, kind in kinds if kind == "sliding_attention"]
    return {"sliding_window": config.sliding_window, "sliding_layers": frozenset(layers)}


def _needed(config: _Config, key: str) -> int:
    value: int | None = getattr(config, key)
    if value is None:
        raise InvalidValue(
            f"{key} is missing", at=(key,), fix=f"every {config.model_type} model has it"
        )
    return value


_FAMILIES: Mapping[str, Callable[[_Config], dict[str, Any]]] = {
    "llama": _llama,
    "smollm3": _llama,
    "phi3": lambda config: {},
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt_oss": _gpt_oss,
}
