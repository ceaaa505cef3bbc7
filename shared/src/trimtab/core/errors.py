"""The errors a user can meet, each with the exit status of the command that raised it.

TrimtabError            1  a fault of ours
├── BadInput            2  a file, key or value that the user can mend
│   └── Unsupported     2  a framework version or feature outside the verified range
└── Infeasible          3  no plan satisfies the constraints
"""


class TrimtabError(Exception):
    """Base of all errors trimtab raises on purpose."""

    exit_status = 1


class BadInput(TrimtabError):
    """The user's input is wrong; the message is one sentence: what, where, what would be right.

    Args:
        what: what is wrong, e.g. ``"bandwidth_bytes_per_s is -1"``.
        where: the place, e.g. ``"cluster.yaml:12, links[3]"``; empty when there is no file.
        fix: what would be right, e.g. ``"give a positive number of bytes per second"``.
    """

    exit_status = 2

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        place = f"{where}: " if where else ""
        remedy = f"; {fix}" if fix else ""
        super().__init__(f"{place}{what}{remedy}.")


class Unsupported(BadInput):
    """A framework version or feature that trimtab was not verified with."""


class Infeasible(TrimtabError):
    """No plan satisfies the constraints.

    Args:
        constraint: the constraint that cannot hold.
        relaxation: the nearest change that would make the problem feasible.
    """

    exit_status = 3

    def __init__(self, constraint: str, *, relaxation: str = "") -> None:
        self.constraint, self.relaxation = constraint, relaxation
        remedy = f"; {relaxation}" if relaxation else ""
        super().__init__(f"infeasible: {constraint}{remedy}.")
