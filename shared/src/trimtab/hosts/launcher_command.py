"""The command lines of training launchers: which launcher it is, and where its own options end."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

from trimtab.core.errors import BadInput
from trimtab.core.launch import Launcher

LAUNCHERS: Mapping[str, Launcher] = {
    "deepspeed": "deepspeed",
    "deepspeed.pt": "deepspeed",
    "ds": "deepspeed",
    "srun": "srun",
    "torchrun": "torchrun",
}
"""The launcher of each program."""

MODULES: Mapping[str, Launcher] = {
    "deepspeed.launcher.runner": "deepspeed",
    "torch.distributed.run": "torchrun",
}
"""The launcher of each module that ``python -m`` can run."""

FLAGS: Mapping[Launcher, frozenset[str]] = {
    "deepspeed": frozenset(
        {
            "--bind-cores-to-rank",
            "--force-multi",
            "--help",
            "--module",
            "--no-local-rank",
            "--no-python",
            "--no-ssh",
            "--no-ssh-check",
            "--quiet",
            "--save-pid",
            "-h",
            "-q",
        }
    ),
    "srun": frozenset(
        {
            "--bcast",
            "--compress",
            "--contiguous",
            "--disable-status",
            "--exact",
            "--exclusive",
            "--get-user-env",
            "--help",
            "--hold",
            "--immediate",
            "--interactive",
            "--kill-on-bad-exit",
            "--label",
            "--multi-prog",
            "--nice",
            "--no-allocate",
            "--no-kill",
            "--overcommit",
            "--overlap",
            "--oversubscribe",
            "--preserve-env",
            "--propagate",
            "--pty",
            "--quiet",
            "--reboot",
            "--resv-ports",
            "--send-libs",
            "--spread-job",
            "--test-only",
            "--unbuffered",
            "--usage",
            "--use-min-nodes",
            "--verbose",
            "--version",
            "--whole",
            "--x11",
            "-E",
            "-H",
            "-I",
            "-K",
            "-O",
            "-Q",
            "-V",
            "-X",
            "-Z",
            "-h",
            "-k",
            "-l",
            "-s",
            "-u",
            "-v",
        }
    ),
    "torchrun": frozenset(
        {
            "--help",
            "--module",
            "--no-python",
            "--run-path",
            "--standalone",
            "--virtual-local-rank",
            "-h",
            "-m",
        }
    ),
}
"""The options that take no value of their own word; all others of a launcher take one.

They are written with hyphens.
"""

WHOLE = frozenset({"--launcher", "--ntasks"})
"""Options that another's name begins with, and that are no abbreviation of it."""

KNOWN = "deepspeed, torchrun, python -m torch.distributed.run, srun"


@dataclass(frozen=True, slots=True)
class LauncherCommand:
    """A launcher's command, cut into its parts.

    Attributes:
        launcher: the kind of launcher.
        program: what starts it, e.g. ``("python", "-m", "torch.distributed.run")``.
        options: the launcher's own options.
        job: the training script and its arguments.
    """

    launcher: Launcher
    program: tuple[str, ...]
    options: tuple[str, ...]
    job: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The whole command."""
        return self.program + self.options + self.job

    def option(self, *names: str) -> str | None:
        """The value of an option (its last one, as the launcher takes it); None if it is not given.

        Args:
            names: its spellings, with hyphens, e.g. ``"-H", "--hostfile"``.
        """
        values = [value for name, value in _pairs(self) if _means(name, names)]
        return values[-1] if values else None

    def with_option(self, names: Sequence[str], value: str, *, as_: str) -> LauncherCommand:
        """The command with an option set to ``value`` in place of whatever it had.

        Args:
            names: the option's spellings, with hyphens.
            value: the new value.
            as_: the spelling to write.
        """
        return replace(self, options=(as_, value, *self.without_option(names).options))

    def without_option(self, names: Sequence[str]) -> LauncherCommand:
        """The command without an option, given by its spellings."""
        kept = [
            word for words in _groups(self) if not _means(_name(words[0]), names) for word in words
        ]
        return replace(self, options=tuple(kept))

    def with_arguments(self, arguments: Sequence[str]) -> LauncherCommand:
        """The command with options put before the launcher's own ones."""
        return replace(self, options=(*arguments, *self.options))


def parse(command: Sequence[str]) -> LauncherCommand:
    """Cuts a launcher's command into its parts.

    Raises:
        BadInput: it starts no known launcher.
    """
    launcher, length = _identify(command)
    program, rest = tuple(command[:length]), tuple(command[length:])
    end = _end_of_options(rest, FLAGS[launcher])
    return LauncherCommand(launcher, program, rest[:end], rest[end:])


def _identify(command: Sequence[str]) -> tuple[Launcher, int]:
    """The launcher, and how many words start it."""
    if not command:
        raise BadInput("there is no command to launch", fix=f"give one of {KNOWN} after --")
    name = PurePath(command[0]).name
    if name in LAUNCHERS:
        return LAUNCHERS[name], 1
    if re.fullmatch(r"python[\d.]*", name) and "-m" in command[:-1]:
        at = command.index("-m") + 1
        if command[at] in MODULES and _are_options_of_python(command[1 : at - 1]):
            return MODULES[command[at]], at + 1
    raise BadInput(f"{command[0]!r} starts no known launcher", fix=f"known are {KNOWN}")


def _are_options_of_python(words: Sequence[str]) -> bool:
    """Whether no script stands among the words, to which what follows would belong."""
    return all(
        word.startswith("-") or before in ("-W", "-X")
        for before, word in zip(("", *words), words, strict=False)
    )


def _end_of_options(words: Sequence[str], flags: frozenset[str]) -> int:
    """Where the first word stands that is neither an option nor an option's value."""
    at = 0
    while at < len(words) and words[at].startswith("-"):
        at += _length(words[at], flags)
    return min(at, len(words))


def _length(word: str, flags: frozenset[str]) -> int:
    """How many words an option takes, with its value."""
    if "=" in word or (not word.startswith("--") and len(word) > 2):
        return 1
    name = _name(word)
    # argparse takes the first letters of a long option for all of it.
    abbreviates = name.startswith("--") and any(flag.startswith(name) for flag in flags)
    return 1 if name in flags or abbreviates else 2


def _groups(command: LauncherCommand) -> list[tuple[str, ...]]:
    """The launcher's options, each with its value."""
    groups, at = [], 0
    while at < len(command.options):
        length = _length(command.options[at], FLAGS[command.launcher])
        groups.append(command.options[at : at + length])
        at += length
    return groups


def _pairs(command: LauncherCommand) -> list[tuple[str, str]]:
    """The names and values of the launcher's options; a flag's value is empty."""
    pairs = []
    for words in _groups(command):
        name = _name(words[0])
        if len(words) == 2:
            value = words[1]
        elif words[0].startswith("--"):
            value = words[0].partition("=")[2]
        else:
            value = words[0][2:]
        pairs.append((name, value))
    return pairs


def _name(word: str) -> str:
    """An option's name with hyphens: torchrun takes hyphens and underscores alike."""
    if not word.startswith("--"):
        return word[:2]
    return word.partition("=")[0].replace("_", "-")


def _means(name: str, names: Sequence[str]) -> bool:
    """Whether a name is one of an option's spellings, or the first letters of one."""
    abbreviates = len(name) > 2 and name not in WHOLE
    return any(name == known or (abbreviates and known.startswith(name)) for known in names)
