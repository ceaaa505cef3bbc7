"""Measured vLLM servers: the rows that the package ``aiconfigurator-core`` ships.

Nothing of them is copied here; they are read from the installed package. Most are InferenceX
(formerly InferenceMAX) runs, whose launch scripts are public: prefix caching off, at most 8,192
tokens in a step, prompts and outputs of 80 to 100 % of the nominal lengths.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from statistics import median
from typing import Any

from trimtab.core.cost.batching import Shape
from trimtab.core.cost.calibration import MAX_MFU, MAX_TTFT_S, Measurement, implied_mfu
from trimtab.core.cost.roofline import Replica
from trimtab.core.cost.work import CacheType, Precision
from trimtab.core.devices import DeviceProfile, device
from trimtab.core.errors import BadInput, Infeasible
from trimtab.core.model import ModelSpec

PACKAGE = "aiconfigurator_core"

MAX_IMPOSSIBLE = 0.05
"""A set of rows with a larger share of impossible ones is left out whole."""
DISTURBANCE = 0.05
"""A TPOT this much above that of a higher concurrency was disturbed."""


@dataclass(frozen=True, slots=True)
class _Served:
    """How a model of the rows was served.

    Attributes:
        config: its file in the package.
        cache: the type of its cache, as the launch scripts say (vLLM's default is the model's).
        mean_length: mean of the lengths, as a share of the nominal ones.
        changes: what to change in its config to read it as a family that we know.
        allreduces_per_layer: as in `Replica`.
    """

    config: str
    cache: CacheType = "bf16"
    mean_length: float = 1.0
    changes: Mapping[str, Any] | None = None
    allreduces_per_layer: int = 2


_SERVED = {
    "meta-llama/Llama-3.1-70B": _Served("meta-llama--Meta-Llama-3.1-70B", "fp8", 0.9),
    "openai/gpt-oss-120b": _Served("openai--gpt-oss-120b", "bf16", 0.9),
    # Shaped like Qwen3-MoE, with other names for the same numbers.
    "MiniMaxAI/MiniMax-M2.5": _Served(
        "MiniMaxAI--MiniMax-M2.5",
        "bf16",
        0.9,
        {"model_type": "qwen3_moe", "num_experts": 256, "moe_intermediate_size": 1536},
        allreduces_per_layer=3,
    ),
    "moonshotai/Kimi-K2.5": _Served(
        "moonshotai--Kimi-K2.5", "bf16", 0.9, {"model_type": "deepseek_v3"}
    ),
    "Qwen/Qwen3-32B": _Served("Qwen--Qwen3-32B"),
    "Qwen/Qwen3-235B-A22B-FP8": _Served("Qwen--Qwen3-235B-A22B-FP8"),
    "nvidia/Llama-3.1-8B-Instruct-FP8": _Served("meta-llama--Meta-Llama-3.1-8B"),
}

_PRECISIONS = {
    # Quantised experts only: the rest of these checkpoints is in 16 bits.
    ("openai/gpt-oss-120b", "fp4"): Precision("bf16", "mxfp4"),
    ("moonshotai/Kimi-K2.5", "int4"): Precision("bf16", "int4"),
}

_SYSTEMS = {"h100_sxm": "H100-SXM", "h200_sxm": "H200"}


@dataclass(frozen=True, slots=True)
class MeasuredServer:
    """A row: which model, where it comes from, and what was measured."""

    model: str
    device: str
    version: str
    expert_parallel: int
    measurement: Measurement


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that are fit to use, and how many each rule left out."""

    servers: tuple[MeasuredServer, ...]
    left_out: Mapping[str, int]


def measured_servers() -> Rows:
    """Reads and cleans the rows; the rules look at measured figures only, never at predictions.

    Raises:
        BadInput: the package is not installed, or lacks the rows.
    """
    left_out: Counter[str] = Counter()
    sets = defaultdict(list)
    for row in _vllm_rows():
        reason = _out_of_scope(row)
        if reason:
            left_out[reason] += 1
        else:
            sets[row["model_path"], row["system"], row["precision"]].append(row)
    kept: list[MeasuredServer] = []
    for rows in sets.values():
        kept += _clean(rows, left_out)
    return Rows(tuple(kept), dict(left_out))


def _clean(rows: Sequence[Mapping[str, str]], left_out: Counter[str]) -> list[MeasuredServer]:
    """One set of rows without the impossible, repeated, cache-limited and disturbed ones."""
    servers = [_server(row) for row in rows]
    impossible = [not _possible(server.measurement) for server in servers]
    if sum(impossible) > MAX_IMPOSSIBLE * len(servers):
        left_out["set with impossible rows (weights do not fit, or MFU > 60 %)"] += len(servers)
        return []
    possible = [s for s, wrong in zip(servers, impossible, strict=True) if not wrong]
    left_out["impossible (weights do not fit, or MFU > 60 %)"] += sum(impossible)
    distinct = _medians(possible)
    left_out["repeat of another row (medians are used)"] += len(possible) - len(distinct)
    prompt = [s for s in distinct if s.measurement.ttft_s <= MAX_TTFT_S]
    left_out["cache-limited (mean TTFT > 3 s)"] += len(distinct) - len(prompt)
    steady = _undisturbed(prompt)
    left_out["disturbed (a higher concurrency has a lower TPOT)"] += len(prompt) - len(steady)
    return steady


def _package() -> Traversable:
    try:
        return files(PACKAGE)
    except ModuleNotFoundError:
        raise BadInput(
            "the package 'aiconfigurator-core', which ships the measured rows, is not installed",
            fix="pip install aiconfigurator-core",
        ) from None


def _vllm_rows() -> Iterator[Mapping[str, str]]:
    """The rows of vLLM servers that prefill and decode in one place."""
    try:
        text = _package().joinpath("systems/silicon_sample.csv").read_text("utf-8")
    except FileNotFoundError:
        raise BadInput(
            "the installed 'aiconfigurator-core' has no systems/silicon_sample.csv",
            fix="install version 0.12",
        ) from None
    for row in csv.DictReader(text.splitlines()):
        if row["backend"] == "vllm" and row["mode"] == "agg":
            yield row


def _out_of_scope(row: Mapping[str, str]) -> str:
    """Why a row cannot be compared with a prediction; empty when it can."""
    if row["system"] not in _SYSTEMS:
        return "device without a profile"
    if row["model_path"] not in _SERVED:
        return "model whose config is not known"
    if float(row["attention_dp_size"] or 1) > 1:
        return "data-parallel attention"
    if _concurrency(row) is None:
        return "concurrency not recorded, or other than the batch"
    return ""


def _concurrency(row: Mapping[str, str]) -> int | None:
    recorded = re.search(r"silicon_concurrency=([\d.]+)", row["silicon_data_source"])
    if recorded is None or float(recorded[1]) != float(row["batch_size"]):
        return None
    return int(float(recorded[1]))


def _server(row: Mapping[str, str]) -> MeasuredServer:
    served, profile = _SERVED[row["model_path"]], device(_SYSTEMS[row["system"]])
    return MeasuredServer(
        model=row["model_path"].rpartition("/")[2],
        device=profile.name,
        version=row["backend_version"],
        expert_parallel=int(float(row["moe_ep_size"] or 1)),
        measurement=Measurement(
            replica=_replica(row, served, profile),
            shape=Shape(
                served.mean_length * float(row["isl"]), served.mean_length * float(row["osl"])
            ),
            concurrency=_concurrency(row) or 1,
            tpot_s=float(row["silicon_tpot_ms"]) / 1e3,
            ttft_s=float(row["silicon_ttft_ms"]) / 1e3,
        ),
    )


def _replica(row: Mapping[str, str], served: _Served, profile: DeviceProfile) -> Replica:
    kind = row["precision"] or "bf16"
    special = _PRECISIONS.get((row["model_path"], kind))
    precision = special or Precision.of("fp8" if kind == "fp8" else "bf16", served.cache)
    return Replica(
        model=_model(row["model_path"], served),
        device=profile,
        tensor_parallel=int(float(row["tp_size"])),
        precision=precision,
        allreduces_per_layer=served.allreduces_per_layer,
    )


_models: dict[str, ModelSpec] = {}


def _model(path: str, served: _Served) -> ModelSpec:
    if path not in _models:
        file = _package().joinpath(f"model_configs/{served.config}_config.json")
        config = json.loads(file.read_text("utf-8"))
        config = {**config.get("text_config", config), **(served.changes or {})}
        _models[path] = ModelSpec.from_hf(config, name=path.rpartition("/")[2])
    return _models[path]


def _possible(measurement: Measurement) -> bool:
    try:
        measurement.replica.kv_capacity_tokens(memory_utilization=1.0)
    except Infeasible:
        return False
    return implied_mfu(measurement) <= MAX_MFU


def _setting(server: MeasuredServer) -> tuple[object, ...]:
    """What was measured, but for the concurrency."""
    measurement = server.measurement
    return (
        server.version,
        server.expert_parallel,
        measurement.replica.tensor_parallel,
        measurement.shape,
    )


def _medians(servers: Sequence[MeasuredServer]) -> list[MeasuredServer]:
    """One server for each setting and concurrency."""
    repeats = defaultdict(list)
    for server in servers:
        repeats[_setting(server), server.measurement.concurrency].append(server)
    return [_median(same) for same in repeats.values()]


def _median(same: Sequence[MeasuredServer]) -> MeasuredServer:
    first = same[0]
    return MeasuredServer(
        first.model,
        first.device,
        first.version,
        first.expert_parallel,
        Measurement(
            first.measurement.replica,
            first.measurement.shape,
            first.measurement.concurrency,
            tpot_s=median(s.measurement.tpot_s for s in same),
            ttft_s=median(s.measurement.ttft_s for s in same),
        ),
    )


def _undisturbed(servers: Sequence[MeasuredServer]) -> list[MeasuredServer]:
    """Without those that are slower than the same setting at a higher concurrency."""
    settings = defaultdict(list)
    for server in servers:
        settings[_setting(server)].append(server)
    kept = []
    for same in settings.values():
        least = float("inf")
        for server in sorted(same, key=lambda s: -s.measurement.concurrency):
            if server.measurement.tpot_s <= least * (1 + DISTURBANCE):
                kept.append(server)
            least = min(least, server.measurement.tpot_s)
    return kept
