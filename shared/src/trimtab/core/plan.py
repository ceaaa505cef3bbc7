"""What every planner returns: a versioned file that says who does what where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from trimtab.core.documents import (
    Document,
    InvalidValue,
    digest,
    nearest,
    read_json,
    shown,
    write_atomic,
)
from trimtab.core.node_names import MAX_NODE_NAME, NODE_NAME_PATTERN
from trimtab.core.solve.certificate import Certificate, relative_gap

PLAN_VERSION = 1

Option = str | int | float | bool


class Figure(Document):
    """An expected figure and its unit, as in ``{"value": 12.5, "unit": "req/s"}``."""

    value: float
    unit: str


class Objective(Document):
    """What the planner optimised, how well it did, and how well anyone could.

    Attributes:
        metric: what was optimised.
        unit: of value and bound.
        better: which way the metric points.
        value: what the plan is expected to reach.
        bound: what no plan can beat; None when no bound is known.
        status: ``optimal`` when value and bound meet within the solver's gap.
        solver: what found the plan.
        wall_s: how long that took.
    """

    metric: str
    unit: str
    better: Literal["lower", "higher"]
    value: float
    bound: float | None = None
    status: Literal["optimal", "feasible"] = "feasible"
    solver: str = ""
    wall_s: NonNegativeFloat = 0.0

    @classmethod
    def certified(
        cls, metric: str, unit: str, better: Literal["lower", "higher"], proof: Certificate
    ) -> Objective:
        """The objective of a solver's answer."""
        bounded = proof.bound not in (float("inf"), float("-inf"))
        return cls(
            metric=metric,
            unit=unit,
            better=better,
            value=proof.objective,
            bound=proof.bound if bounded else None,
            status=proof.status,
            solver=proof.solver,
            wall_s=proof.wall_s,
        )

    @property
    def gap(self) -> float | None:
        """Relative distance of value and bound; None when no bound is known."""
        return None if self.bound is None else relative_gap(self.value, self.bound)


class Slot(Document):
    """One device of one node."""

    node: str = Field(pattern=NODE_NAME_PATTERN, max_length=MAX_NODE_NAME)
    device: NonNegativeInt


class Stage(Document):
    """One pipeline stage of a replica.

    Attributes:
        device: the device's profile name.
        tensor_parallel: how many devices share each layer.
        layers: how many layers the stage holds; None for an even split.
    """

    device: str
    tensor_parallel: PositiveInt = 1
    layers: PositiveInt | None = None


class Group(Document):
    """Replicas that are alike.

    Attributes:
        name: unique in the plan.
        model: what they serve.
        role: prefill and decode replicas of a split deployment, else serve.
        replicas: how many there are.
        stages: the pipeline of each.
        slots: for each replica its devices in rank order (stage by stage); empty when the plan
            leaves the placement to whoever starts it.
        engine_args: the engine's command line options by their long names without dashes.
        env: environment variables.
        usd_per_hour: rent of the whole group.
        expected: figures of one replica.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str = Field(min_length=1)
    role: Literal["serve", "prefill", "decode"] = "serve"
    replicas: PositiveInt = 1
    stages: tuple[Stage, ...] = Field(min_length=1)
    slots: tuple[tuple[Slot, ...], ...] = ()
    engine_args: Mapping[str, Option] = {}
    env: Mapping[str, str] = {}
    usd_per_hour: NonNegativeFloat = 0.0
    expected: Mapping[str, Figure] = {}

    @property
    def devices(self) -> int:
        """How many devices a replica has."""
        return sum(stage.tensor_parallel for stage in self.stages)

    @model_validator(mode="after")
    def _placed_whole(self) -> Group:
        if self.slots and len(self.slots) != self.replicas:
            raise InvalidValue(
                f"{len(self.slots)} replicas have slots and there are {self.replicas}",
                at=("slots",),
                fix="give one list of slots for each replica",
            )
        for index, slots in enumerate(self.slots):
            if len(slots) != self.devices:
                raise InvalidValue(
                    f"a replica has {len(slots)} slots and its stages have {self.devices} devices",
                    at=("slots", index),
                    fix="give one slot for each device",
                )
        return self


class Route(Document):
    """The share of a class of requests that a group serves."""

    request_class: str
    group: str
    weight: float = Field(gt=0, le=1)


class Plan(Document):
    """A plan, and the content of a plan file.

    Attributes:
        planner: which planner made it, e.g. ``fleet``.
        created: when.
        inputs: SHA-256 of each input (`documents.digest`) by the name the user knows it under.
        objective: what was optimised and the bound on it.
        expected: the plan's expected figures by name.
        groups: replicas of serving engines.
        routing: shares of each class of requests; they sum to 1 for each class.
        ranks: where each rank of a training job runs, in rank order.
        details: the planner's own, e.g. the steps of a collective.
        warnings: one sentence each.
    """

    kind: Literal["trimtab-plan"] = "trimtab-plan"
    version: Literal[1] = 1
    planner: str = Field(min_length=1)
    created: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    inputs: Mapping[str, str] = {}
    objective: Objective
    expected: Mapping[str, Figure] = {}
    groups: tuple[Group, ...] = ()
    routing: tuple[Route, ...] = ()
    ranks: tuple[Slot, ...] = ()
    details: Mapping[str, JsonValue] = {}
    warnings: tuple[str, ...] = ()

    @field_validator("version", mode="before")
    @classmethod
    def _known_version(cls, version: Any) -> Any:
        if version != PLAN_VERSION or isinstance(version, bool):
            raise InvalidValue(
                f"the plan has version {shown(version)}",
                fix=f"this trimtab reads version {PLAN_VERSION}: plan again, or update trimtab",
            )
        return version

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        names = Counter(group.name for group in self.groups)
        for index, group in enumerate(self.groups):
            if names[group.name] > 1:
                raise InvalidValue(
                    f"several groups have the name {group.name!r}",
                    at=("groups", index, "name"),
                    fix="give each group a name of its own",
                )
        self._check_routing(set(names))
        self._check_slots()
        return self

    def _check_routing(self, groups: set[str]) -> None:
        shares: Counter[str] = Counter()
        for index, route in enumerate(self.routing):
            if route.group not in groups:
                raise InvalidValue(
                    f"a route leads to the unknown group {route.group!r}",
                    at=("routing", index, "group"),
                    fix=nearest(route.group, groups),
                )
            shares[route.request_class] += route.weight  # type: ignore[assignment]
        for name, share in shares.items():
            if abs(share - 1) > 1e-6:
                raise InvalidValue(
                    f"the shares of class {name!r} sum to {share:g}",
                    at=("routing",),
                    fix="make them sum to 1",
                )

    def _check_slots(self) -> None:
        taken = Counter(
            [slot for group in self.groups for replica in group.slots for slot in replica]
        )
        taken_by_ranks = Counter(self.ranks)
        for used, key in ((taken, "groups"), (taken_by_ranks, "ranks")):
            twice = next((slot for slot, times in used.items() if times > 1), None)
            if twice is not None:
                raise InvalidValue(
                    f"device {twice.device} of node {twice.node!r} is given out twice",
                    at=(key,),
                    fix="use each device once",
                )

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Reads a plan file.

        Raises:
            BadInput: the file cannot be read, is no plan, or has another version.
        """
        return read_json(path, cls)

    def write(self, path: str | Path) -> None:
        """Writes the plan file, whole or not at all."""
        write_atomic(path, self.model_dump_json(indent=2) + "\n")

    def stale_inputs(self, sources: Mapping[str, object]) -> list[str]:
        """The inputs that changed since the plan was made.

        Args:
            sources: the inputs as they are now, by the names in ``inputs``; each a `Path` or a
                document. Names that the plan does not have count as changed.
        """
        return [name for name, now in sources.items() if self.inputs.get(name) != digest(now)]
