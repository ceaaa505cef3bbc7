"""Answers that the router gives itself, in the shape of the OpenAI API's errors."""

from __future__ import annotations

import json
import math
from http import HTTPStatus

from trimtab.core.errors import BadInput
from trimtab.hosts.vllm.middleware import Send

_KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    502: "BackendFailedError",
    503: "ServiceUnavailableError",
    504: "BackendTimeoutError",
}


class Refusal(Exception):
    """The router answers a request itself.

    Args:
        status: the HTTP status.
        message: one sentence for whoever sent the request.
        param: the header or key at fault.
        retry_after_s: when it may be worth another try; None where it is not.
    """

    def __init__(
        self, status: int, message: str, *, param: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, error: BadInput) -> Refusal:
        """The answer to a request with a field that cannot be."""
        return cls(400, str(error), param=error.where.removeprefix("header "))

    def detail(self) -> bytes:
        """The JSON body."""
        kind = _KINDS.get(self.status, HTTPStatus(self.status).phrase)
        error = {
            "message": self.message,
            "type": kind,
            "param": self.param or None,
            "code": self.status,
        }
        return json.dumps({"error": error}).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers of the answer."""
        found = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            found.append((b"retry-after", str(max(1, math.ceil(self.retry_after_s))).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        return found

    async def send(self, send: Send) -> None:
        """Answers with the refusal."""
        body = self.detail()
        headers = [*self.headers(), (b"content-length", str(len(body)).encode())]
        start = {"type": "http.response.start", "status": self.status, "headers": headers}
        await send(start)
        await send({"type": "http.response.body", "body": body})
