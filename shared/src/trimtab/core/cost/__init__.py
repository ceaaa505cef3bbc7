"""What things cost in seconds: a step on a GPU, a steady batch, a collective, a KV transfer."""

from trimtab.core.cost.batching import (
    Shape,
    SteadyState,
    StepTime,
    decode_s,
    highest_rate,
    largest_batch,
    prefill_s,
    steady_state,
)
from trimtab.core.cost.calibration import Calibration, Measurement, calibrate, implied_mfu
from trimtab.core.cost.collectives import (
    Collective,
    GenModel,
    co_located_ps,
    halving_doubling,
    hierarchical_ps,
    least_accessed,
    reduce_broadcast,
    ring,
)
from trimtab.core.cost.cut_bound import (
    allreduce_bound_s,
    cut_bound_s_per_byte,
    two_rounds_bound_s_per_byte,
)
from trimtab.core.cost.kv_transfer import exposed_transfer_s, kv_transfer_s
from trimtab.core.cost.model_fit import (
    Interval,
    ModelFit,
    Run,
    fit_model,
    fit_plain_model,
    prediction_error,
)
from trimtab.core.cost.optimality import Optimality, optimality
from trimtab.core.cost.plan_cost import Constants, ExchangeCost, PlanCost, PlanEvaluator
from trimtab.core.cost.roofline import (
    DEFAULTS,
    RAW,
    Replica,
    Roofline,
    RooflineConstants,
    to_step_cost,
)
from trimtab.core.cost.step import (
    EngineLimits,
    EngineProfile,
    MeasuredStep,
    StepBatch,
    StepCost,
    fit_step_cost,
)
from trimtab.core.cost.work import ModelWork, Precision, Work

__all__ = [
    "DEFAULTS",
    "RAW",
    "Calibration",
    "Collective",
    "Constants",
    "EngineLimits",
    "EngineProfile",
    "ExchangeCost",
    "GenModel",
    "Interval",
    "MeasuredStep",
    "Measurement",
    "ModelFit",
    "ModelWork",
    "Optimality",
    "PlanCost",
    "PlanEvaluator",
    "Precision",
    "Replica",
    "Roofline",
    "RooflineConstants",
    "Run",
    "Shape",
    "SteadyState",
    "StepBatch",
    "StepCost",
    "StepTime",
    "Work",
    "allreduce_bound_s",
    "calibrate",
    "co_located_ps",
    "cut_bound_s_per_byte",
    "decode_s",
    "exposed_transfer_s",
    "fit_model",
    "fit_plain_model",
    "fit_step_cost",
    "halving_doubling",
    "hierarchical_ps",
    "highest_rate",
    "implied_mfu",
    "kv_transfer_s",
    "largest_batch",
    "least_accessed",
    "optimality",
    "prediction_error",
    "prefill_s",
    "reduce_broadcast",
    "ring",
    "steady_state",
    "to_step_cost",
    "two_rounds_bound_s_per_byte",
]
