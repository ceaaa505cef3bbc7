"""HiGHS that prints nothing, so that what a command prints is its own."""

from __future__ import annotations

import highspy


class QuietHighs(highspy.Highs):
    """A solver without callbacks, with which it would announce its name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.setOptionValue("output_flag", False)

    def enableCallbacks(self) -> None:  # noqa: N802
        """Called by the constructor; it enables none, and turns output off before any comes."""
        self.setOptionValue("output_flag", False)
