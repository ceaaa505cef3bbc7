"""The steps of an AllReduce plan as files for MSCCL, one for each size of the payload."""

from __future__ import annotations

import math
from itertools import pairwise

from pydantic import ConfigDict, PositiveFloat

from trimtab.core.documents import Document, validate
from trimtab.core.errors import BadInput
from trimtab.core.plan import Plan


class _Size(Document):
    """What of a planned size is needed here."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    payload_bytes: PositiveFloat
    schedule: dict[str, object]


def msccl(plan: Plan) -> dict[str, str]:
    """One XML file for each size, to be used up to half way to the next one.

    Raises:
        BadInput: the plan is another planner's.
        Unsupported: MSCCL cannot hold a size's steps.
    """
    from trimtab.core.collectives import Schedule
    from trimtab.core.collectives.msccl import write_msccl

    if plan.planner != "allreduce":
        raise BadInput(
            f"the {plan.planner} plan has no collective",
            fix="emit a plan of trimtab plan allreduce",
        )
    sizes = validate(list[_Size], plan.details.get("sizes"), where="details.sizes")
    sizes = sorted(sizes, key=lambda size: size.payload_bytes)
    middles = [math.sqrt(a.payload_bytes * b.payload_bytes) for a, b in pairwise(sizes)]
    files = {}
    for size, low, high in zip(sizes, [0, *middles], [*middles, 2**63], strict=True):
        schedule = validate(Schedule, size.schedule, where="details.sizes.schedule")
        name = f"allreduce-{size.payload_bytes:.0f}"
        files[f"{name}.xml"] = write_msccl(schedule, name, min_bytes=low, max_bytes=high)
    return files
