"""What the tests of applied plans share."""

from __future__ import annotations

import socket

import pytest


@pytest.fixture
def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return str(bound.getsockname()[1])
