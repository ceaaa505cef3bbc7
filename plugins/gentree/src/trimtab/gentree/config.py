"""The options of the plugin, under ``"gentree"`` in the ``"trimtab"`` block."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class GentreeConfig(BaseModel):
    """Which network the AllReduce of a training job is planned for."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    topology: str = Field(
        description="cluster file, or what trimtab import reads; its links form a tree"
    )
    constants: str | None = Field(
        None, description="constants of the cost model (YAML or JSON); defaults without it"
    )
    always: bool = Field(
        False, description="run the plan even where the model finds the base backend faster"
    )
    cuda: bool = Field(
        False, description="run plans on CUDA tensors too, over NCCL; not verified on a GPU"
    )
