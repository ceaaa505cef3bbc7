"""Device profiles: the constants of GPUs that plans are made for, each with its source."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from trimtab.core.documents import (
    Document,
    InvalidValue,
    nearest,
    parse_yaml,
    read_yaml,
    validate,
)
from trimtab.core.errors import BadInput
from trimtab.core.units import Bytes, BytesPerSecond, FlopPerSecond

Dtype = Literal["fp32", "fp16", "bf16", "fp8", "int8"]


class PeakRates(Document):
    """Peak dense arithmetic in FLOP/s (OP/s for int8) by operand type; None where it lacks one.

    Matrix units with fp32 accumulation, as inference engines use them; never the figures with
    structured sparsity, which are twice as high.
    """

    fp32: FlopPerSecond | None = Field(None, gt=0)
    fp16: FlopPerSecond | None = Field(None, gt=0)
    bf16: FlopPerSecond | None = Field(None, gt=0)
    fp8: FlopPerSecond | None = Field(None, gt=0)
    int8: FlopPerSecond | None = Field(None, gt=0)


class Sources(Document):
    """Where each constant of a profile comes from."""

    memory_bytes: str = "not stated"
    memory_bandwidth_bytes_per_s: str = "not stated"
    peak_flop_per_s: str = "not stated"
    link_bandwidth_bytes_per_s: str = "not stated"
    tdp_w: str = "not stated"
    usd_per_hour: str = "not stated"


class DeviceProfile(Document):
    """One accelerator.

    Attributes:
        name: the name in cluster files.
        vendor: who makes it.
        aliases: other names it is found under, such as the one its driver reports.
        memory_bytes: total memory as the driver reports it.
        memory_bandwidth_bytes_per_s: peak memory bandwidth.
        peak_flop_per_s: peak dense arithmetic by operand type.
        link: what joins the devices inside one node.
        link_bandwidth_bytes_per_s: from one device to its peers in the node, one direction.
        tdp_w: board power.
        usd_per_hour: a typical rent for one device; it changes weekly, so override it.
        usd_per_hour_as_of: the date of that rent.
        sources: where each constant comes from.
    """

    name: str = Field(min_length=1)
    vendor: str
    aliases: tuple[str, ...] = ()
    memory_bytes: Bytes = Field(gt=0)
    memory_bandwidth_bytes_per_s: BytesPerSecond = Field(gt=0)
    peak_flop_per_s: PeakRates
    link: str
    link_bandwidth_bytes_per_s: BytesPerSecond = Field(gt=0)
    tdp_w: float = Field(gt=0)
    usd_per_hour: float = Field(ge=0)
    usd_per_hour_as_of: date | None = None
    sources: Sources = Sources()

    def flop_per_s(self, dtype: Dtype) -> float:
        """Peak dense FLOP/s for operands of a type.

        Raises:
            BadInput: the device has no fast path for the type.
        """
        rate: float | None = getattr(self.peak_flop_per_s, dtype)
        if rate is None:
            rates = self.peak_flop_per_s.model_dump(exclude_none=True)
            raise BadInput(
                f"{self.name} has no {dtype} arithmetic", fix=f"use {' or '.join(rates)}"
            )
        return rate


class DeviceFile(Document):
    """A file of device profiles."""

    devices: tuple[DeviceProfile, ...]

    @field_validator("devices")
    @classmethod
    def _distinct(cls, devices: tuple[DeviceProfile, ...]) -> tuple[DeviceProfile, ...]:
        seen: dict[str, str] = {}
        for index, profile in enumerate(devices):
            for name in (profile.name, *profile.aliases):
                other = seen.setdefault(_folded(name), profile.name)
                if other != profile.name:
                    raise InvalidValue(
                        f"{profile.name!r} and {other!r} both go by the name {name!r}",
                        at=(index, "name"),
                        fix="give each device names of its own",
                    )
        return devices


@cache
def shipped_devices() -> tuple[DeviceProfile, ...]:
    """The profiles that come with trimtab (``devices.yaml`` beside this module)."""
    text = files("trimtab.core").joinpath("devices.yaml").read_text("utf-8")
    data, lines = parse_yaml(text, where="devices.yaml")
    return validate(DeviceFile, data, where="devices.yaml", lines=lines).devices


def read_devices(path: str | Path) -> tuple[DeviceProfile, ...]:
    """Reads a user's device profiles, which then go before the shipped ones.

    Raises:
        BadInput: the file does not fit `DeviceFile`.
    """
    return read_yaml(path, DeviceFile).devices


def device(name: str, own: Iterable[DeviceProfile] = ()) -> DeviceProfile:
    """The profile of a name or alias, whatever its case and punctuation.

    Args:
        name: for example ``"H100-SXM"``, ``"h100"`` or ``"NVIDIA A100-SXM4-80GB"``.
        own: profiles that go before the shipped ones.

    Raises:
        BadInput: no device has the name; it says the nearest.
    """
    known: list[str] = []
    for profile in (*own, *shipped_devices()):
        names = (profile.name, *profile.aliases)
        if _folded(name) in map(_folded, names):
            return profile
        known.extend(names)
    raise BadInput(f"there is no device {name!r}", fix=nearest(name, known))


@cache
def _folded(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))
