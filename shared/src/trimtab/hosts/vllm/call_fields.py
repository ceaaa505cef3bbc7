"""Reading what clients say about a call, from ``vllm_xargs`` and from headers."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping

from trimtab.core.errors import BadInput
from trimtab.core.policy import FIELD_PREFIX, CallField, FieldValue

logger = logging.getLogger(__name__)

_UNKNOWN_LIMIT = 100
"""How many unknown names are remembered, so that a client cannot fill the memory or the log."""

_warned: set[str] = set()


def _warn_once(name: str, known: Mapping[str, CallField]) -> None:
    if name in _warned or len(_warned) >= _UNKNOWN_LIMIT:
        return
    _warned.add(name)
    near = difflib.get_close_matches(name, known, n=1)
    meant = f" (did the client mean {FIELD_PREFIX}{near[0]}?)" if near else ""
    logger.warning(
        "Ignoring the unknown vllm_xargs key %s%s; no installed trimtab plugin reads it%s.",
        FIELD_PREFIX,
        name[:80],
        meant,
    )


def from_xargs(
    xargs: Mapping[str, object], known: Mapping[str, CallField]
) -> dict[str, FieldValue]:
    """The known ``trimtab.*`` entries without their prefix; unknown ones are warned of once.

    Raises:
        BadInput: an entry has the wrong type or is out of range.
    """
    fields: dict[str, FieldValue] = {}
    for key, value in xargs.items():
        if not key.startswith(FIELD_PREFIX):
            continue
        name = key[len(FIELD_PREFIX) :]
        if name in known:
            fields[name] = known[name].check(name, value)
        else:
            _warn_once(name, known)
    return fields


def from_headers(
    headers: Mapping[str, str], known: Mapping[str, CallField]
) -> dict[str, FieldValue]:
    """The fields that the request's headers (lower-case names) say.

    Raises:
        BadInput: a header does not hold a usable value.
    """
    return {
        name: call_field.from_header(name, headers[call_field.header.lower()])
        for name, call_field in known.items()
        if call_field.header is not None and call_field.header.lower() in headers
    }


def from_engine(
    xargs: Mapping[str, object] | None, known: Mapping[str, CallField]
) -> dict[str, FieldValue]:
    """As `from_xargs`, for requests that no middleware has checked: a bad entry is left out.

    By the time a request is in the engine it can no longer be refused, and a client's mistake must
    not reach a policy.
    """
    fields: dict[str, FieldValue] = {}
    for key, value in (xargs or {}).items():
        if key.startswith(FIELD_PREFIX):
            try:
                fields.update(from_xargs({key: value}, known))
            except BadInput as error:
                if key not in _warned and len(_warned) < _UNKNOWN_LIMIT:
                    _warned.add(key)
                    logger.warning("Ignoring a call's field: %s", error)
    return fields
