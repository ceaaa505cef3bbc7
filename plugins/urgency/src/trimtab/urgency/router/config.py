"""The options of the router: the file that ``trimtab route`` and ``trimtab up`` read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from trimtab.core.documents import Document, InvalidValue
from trimtab.core.errors import BadInput
from trimtab.urgency.config import UrgencyConfig
from trimtab.urgency.dispatch import RULES, Rule, rule

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class BackendOptions(Document):
    """A server that runs already."""

    url: str = Field(description="its address without a path, e.g. http://10.0.0.7:8000")
    name: str | None = Field(None, pattern=_NAME, description="its name on the page; else its host")
    seats: int | None = Field(
        None, ge=1, le=65_536, description="calls it runs at once; learnt where it is not given"
    )
    api_key: str | None = Field(None, min_length=1, description="the key that it asks for")

    @field_validator("url")
    @classmethod
    def _plain_address(cls, url: str) -> str:
        parts = urlsplit(url)
        try:
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is no number, or out of range
            usable = False
        if not usable or parts.path.strip("/") or parts.query or parts.fragment:
            raise InvalidValue(f"{url!r} is no address of a server", fix="give http://HOST:PORT")
        return url.rstrip("/")

    @property
    def label(self) -> str:
        """What the backend is called."""
        return self.name or urlsplit(self.url).netloc.rpartition("@")[2]


class ServerOptions(Document):
    """A vLLM server that ``trimtab up`` starts."""

    model: str = Field(min_length=1, description="a folder with a model, or a model's name")
    name: str = Field(pattern=_NAME, description="its name on the page, and of its log")
    served_name: str = Field("model", min_length=1, description="the model's name in the API")
    port: int = Field(0, ge=0, le=65_535, description="where it listens; 0 for a free port")
    arguments: tuple[str, ...] = Field((), description="further arguments of vllm serve")
    environment: dict[str, str] = Field({}, description="variables set for it, e.g. which GPU")
    seats: int | None = Field(
        None, ge=1, le=65_536, description="calls it runs at once; learnt where it is not given"
    )

    @field_validator("arguments", mode="before")
    @classmethod
    def _words(cls, arguments: Any) -> Any:
        """YAML reads ``4`` as a number, and a command line has words."""
        return [_word(word) for word in arguments] if isinstance(arguments, list) else arguments

    @field_validator("environment", mode="before")
    @classmethod
    def _values(cls, environment: Any) -> Any:
        if not isinstance(environment, dict):
            return environment
        return {name: _word(value) for name, value in environment.items()}


def _word(value: Any) -> Any:
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


class TenantOptions(Document):
    """Whoever uses the router with keys of their own."""

    name: str = Field(pattern=_NAME, description="the tenant's name on the page and in metrics")
    keys: tuple[str, ...] = Field(min_length=1, description="its API keys")
    weight: float = Field(1.0, gt=0, le=1000, description="its part of the service under overload")
    min_deadline_s: float = Field(
        0.0, ge=0, le=86_400, description="a shorter deadline of its calls counts as this one"
    )
    max_running: int | None = Field(
        None, ge=1, le=1_000_000, description="calls it may have in the servers at once"
    )

    @field_validator("keys")
    @classmethod
    def _usable(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        if any(len(key) < 8 or not key.isascii() or not key.isprintable() for key in keys):
            raise InvalidValue(
                "a key is too short or not plain text", fix="give at least 8 ASCII characters"
            )
        return keys


class DispatchOptions(Document):
    """Which server a call is sent to."""

    rule: str = Field("auto", description="the rule that chooses")
    options: dict[str, bool | float] = Field({}, description="the rule's own options")

    @model_validator(mode="after")
    def _known(self) -> DispatchOptions:
        try:
            self.make()
        except BadInput as error:
            at = ("options",) if self.rule in RULES else ("rule",)
            raise InvalidValue(error.what, at=at, fix=error.fix) from None
        return self

    def make(self) -> Rule:
        """A new rule.

        Raises:
            BadInput: none has this name, or it has no such option.
        """
        return rule(self.rule, **self.options)


class Limits(Document):
    """What the router takes in, and how long it waits."""

    body_bytes: int = Field(
        16 * 2**20, ge=1024, le=2**30, description="a longer request is answered with 413"
    )
    queued: int = Field(
        10_000, ge=1, le=1_000_000, description="calls that may wait; one more is answered with 429"
    )
    queued_share: float = Field(
        0.5, gt=0, le=1, description="share of the queue that one of several tenants may fill"
    )
    wait_s: float = Field(
        600.0, gt=0, le=86_400, description="a call that waited for so long is answered with 503"
    )
    outage_s: float = Field(
        15.0, ge=0, le=3600, description="for how long calls wait while no server is up"
    )
    first_byte_s: float = Field(
        600.0, gt=0, le=86_400, description="a server silent for so long loses the call to another"
    )
    stall_s: float = Field(
        300.0, gt=0, le=86_400, description="an answer that pauses for so long is ended"
    )
    retries: int = Field(
        2, ge=0, le=10, description="how often a call is sent again whose server failed it"
    )
    fair_lag_s: float = Field(
        20.0,
        ge=0,
        le=86_400,
        description="seconds of service by which urgency may put a tenant ahead of another "
        "that waits",
    )


class HealthOptions(Document):
    """How the servers are watched."""

    every_s: float = Field(1.0, gt=0, le=60, description="time between looks at /health, /metrics")
    timeout_s: float = Field(5.0, gt=0, le=60, description="a look may take so long")
    failures: int = Field(3, ge=1, le=100, description="failures in a row that take a server out")
    longest_pause_s: float = Field(
        30.0, gt=0, le=3600, description="the longest time between looks at a server that is down"
    )


class RouterConfig(Document):
    """The whole file; every key has a default but the servers."""

    backends: tuple[BackendOptions, ...] = Field((), description="servers that run already")
    servers: tuple[ServerOptions, ...] = Field((), description="servers to start (trimtab up)")
    tenants: tuple[TenantOptions, ...] = Field(
        (), description="who may use the router; without any, everybody without a key"
    )
    host: str = Field("127.0.0.1", min_length=1, description="the address to listen on")
    port: int = Field(8080, ge=0, le=65_535, description="the port; 0 for a free one")
    dispatch: DispatchOptions = Field(DispatchOptions(), description="where calls are sent")
    urgency: UrgencyConfig = Field(UrgencyConfig(), description="how waiting calls are ordered")
    limits: Limits = Limits()
    health: HealthOptions = HealthOptions()
    log_level: Literal["warning", "info", "debug"] = "warning"

    @model_validator(mode="after")
    def _tell_apart(self) -> RouterConfig:
        names = [backend.label for backend in self.backends]
        names += [server.name for server in self.servers]
        _once(names, "backends", "name of a server")
        _once((tenant.name for tenant in self.tenants), "tenants", "name of a tenant")
        _once((key for t in self.tenants for key in t.keys), "tenants", "API key", secret=True)
        return self


def _once(values: Iterable[str], where: str, what: str, *, secret: bool = False) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        shown = "" if secret else f" {twice[0]!r}"
        raise InvalidValue(f"the {what}{shown} is given twice", at=(where,), fix="give it once")
