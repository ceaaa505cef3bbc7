"""Makes .venv: the pinned CPU stack, every distribution here as editable, and the small real model.

Nothing is done twice: a stamp in .venv tells what was installed. Each failure a newcomer may meet
is told in one sentence.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements" / "cpu.lock"
STAMP = VENV / "setup.json"
UNFINISHED = VENV / "setup.unfinished"
LOG = VENV / "setup.log"

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDED_BYTES = 6 * 10**9

THROUGH_SHELL = """\
#!/bin/sh
'''exec' "{python}" "$0" "$@"
' '''
"""
"""How a Python script starts where its interpreter cannot be named behind ``#!``."""

_UNREACHABLE = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError"
    r"|Max retries exceeded|Connection (refused|broken|reset)|Temporary failure in name resolution"
)
_REACHED = re.compile(
    r"(?:Collecting|Processing|Requirement already satisfied:) (?:[^\s(]*/)?([^\s(]+)"
)
_NOT_FOUND = re.compile(r"No matching distribution found for (\S+)")
_NO_CANDIDATE = re.compile(r"No matching distribution|ResolutionImpossible")
"""The second is what pip says where its settings constrain the package as well."""


class SetupError(Exception):
    """Why the environment cannot be made, and what would help, in one sentence."""


class PipError(Exception):
    """pip has failed; ``output`` is what it said."""

    def __init__(self, output: str) -> None:
        super().__init__(output)
        self.output = output


@dataclass(frozen=True)
class Stamp:
    """What an environment was made from."""

    root: str
    python: str
    lock: str
    distributions: str

    @classmethod
    def of_checkout(cls) -> Stamp:
        """The stamp that an up-to-date environment of this checkout bears."""
        projects = [folder / "pyproject.toml" for folder in distributions()]
        kernels = ROOT / "kernels"
        compiled = [kernels / "setup.py", *sorted((kernels / "src").rglob("*.?pp"))]
        return cls(
            root=str(ROOT),
            python=platform.python_version(),
            lock=digest(LOCK),
            distributions=digest(*projects, *compiled, Path(__file__)),
        )

    @classmethod
    def of_environment(cls) -> Stamp | None:
        """The stamp that .venv bears; None when it was never finished."""
        try:
            return cls(**json.loads(STAMP.read_text()))
        except (OSError, ValueError, TypeError):
            return None


def distributions() -> list[Path]:
    """The folders of the distributions, those that others need first."""
    inner = [ROOT / "shared", ROOT / "kernels", *sorted((ROOT / "plugins").iterdir()), ROOT]
    return [folder for folder in inner if (folder / "pyproject.toml").is_file()]


def digest(*paths: Path) -> str:
    """The SHA-256 of files, in hex."""
    state = hashlib.sha256()
    for path in paths:
        state.update(path.read_bytes())
    return state.hexdigest()


def say(text: str) -> None:
    """Shows a line of progress."""
    print(text, file=sys.stderr, flush=True)


def make() -> None:
    """Brings .venv up to date.

    Raises:
        SetupError: it cannot be.
    """
    wanted, found = Stamp.of_checkout(), Stamp.of_environment()
    if found != wanted:
        if UNFINISHED.exists():
            shutil.rmtree(VENV)
        check_machine()
        if found is None or (found.root, found.python) != (wanted.root, wanted.python):
            make_environment()
            found = None
        STAMP.unlink(missing_ok=True)
        if found is None or found.lock != wanted.lock:
            UNFINISHED.touch()
            install_stack()
            UNFINISHED.unlink()
        install_distributions()
        mend_scripts()
        STAMP.write_text(json.dumps(asdict(wanted)))
    prepare_model()


def check_machine() -> None:
    """Fails early where the stack cannot be installed."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise SetupError(
            f"the pinned CPU stack is for Linux on x86_64, and this is {system} on {machine}: "
            "install the distributions beside a vLLM of your own (see README.md)"
        )
    free_bytes = shutil.disk_usage(ROOT).free
    installed = any(VENV.glob("lib/python*/site-packages/torch"))
    if not installed and free_bytes < NEEDED_BYTES:
        raise SetupError(disk_full(free_bytes))


def disk_full(free_bytes: int) -> str:
    """The sentence for a disk that is too small."""
    return (
        f"the disk of {ROOT} has {free_bytes / 1e9:.1f} GB free and the CPU stack needs about "
        f"{NEEDED_BYTES / 1e9:.0f} GB: make room, or clone to a larger disk"
    )


def make_environment() -> None:
    """Creates .venv, or takes one that was made by hand."""
    if PYTHON.exists() and not STAMP.exists():
        if in_environment():
            say(f"Using .venv and its Python {platform.python_version()}")
            ensure_pip()
            return
        say("Replacing .venv, whose Python does not fit")
    say(f"Creating .venv with Python {platform.python_version()}")
    base: str = getattr(sys, "_base_executable", sys.executable)
    subprocess.run([base, "-m", "venv", "--clear", VENV], check=True)


def in_environment() -> bool:
    """Whether this very process runs on .venv's Python."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def ensure_pip() -> None:
    """Puts pip into an environment that came without, as those of uv do."""
    if subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode:
        subprocess.run([PYTHON, "-m", "ensurepip"], check=True, stdout=subprocess.DEVNULL)


def install_stack() -> None:
    """Installs the lock; torch first, since its CPU wheel may have to come from another index."""
    pins = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    try:
        install_torch(torch)
        say(f"Installing the pinned CPU stack: {len(pins)} packages, a few minutes")
        pip(["install", "--no-deps", "-r", str(LOCK)], expected=len(pins))
    except PipError as error:
        raise SetupError(explain(error.output)) from None


def install_torch(pin: str) -> None:
    """Installs the CPU build of torch from pip's own indexes, or from PyTorch's."""
    say(f"Installing {pin}")
    try:
        pip(["install", "--no-deps", pin])
        return
    except PipError as error:
        if not _NO_CANDIDATE.search(error.output) or _UNREACHABLE.search(error.output):
            raise
    say(f"pip's indexes have no {pin}: taking it from PyTorch's CPU wheels, {TORCH_CPU_INDEX}")
    try:
        pip(["install", "--no-deps", "--index-url", TORCH_CPU_INDEX, pin])
    except PipError as error:
        if not _NO_CANDIDATE.search(error.output) and not _UNREACHABLE.search(error.output):
            raise
        raise SetupError(
            f"neither pip's indexes nor {TORCH_CPU_INDEX} give {pin} for Python "
            f"{platform.python_version()}: let pip reach one of them, or put the wheel in a "
            "folder and name that in PIP_FIND_LINKS"
        ) from None


def mend_scripts() -> None:
    """Lets the older kind of scripts start where the checkout's path has a space or is long.

    pip starts those of entry points through a shell there, but not the ``scripts`` of deepspeed.
    """
    head = f"#!{PYTHON}\n".encode()
    if b" " not in head and len(head) < 128:
        return
    through_shell = THROUGH_SHELL.format(python=PYTHON)
    for script in (VENV / "bin").iterdir():
        content = script.read_bytes() if script.is_file() else b""
        if content.startswith(head):
            script.write_bytes(through_shell.encode() + content.removeprefix(head))


def install_distributions() -> None:
    """Installs what this checkout holds, as editable."""
    folders = distributions()
    say(f"Installing {len(folders)} distributions of this checkout")
    arguments = ["install", "--no-deps", "--no-build-isolation", "--no-index"]
    for folder in folders:
        arguments += ["--editable", str(folder)]
    try:
        pip(arguments)
    except PipError as error:
        raise SetupError(explain(error.output)) from None
    # tox tells a changed list of requirements, but not a changed distribution behind one.
    shutil.rmtree(ROOT / ".tox" / "unit", ignore_errors=True)


def prepare_model() -> None:
    """Makes the small real model in the user's cache; costs nothing when it is there."""
    code = "from trimtab.hosts.vllm.small_model import small_model; small_model()"
    if subprocess.run([PYTHON, "-c", code], stdin=subprocess.DEVNULL).returncode:
        raise SetupError("the small model could not be prepared; the lines above say why")


def pip(arguments: Sequence[str], *, expected: int = 0) -> None:
    """Runs the environment's pip, with a counter where the number of packages is known.

    Raises:
        PipError: pip has failed.
    """
    # pip unpacks into TMPDIR, which is often smaller than the checkout's disk.
    temporary = VENV / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments]
    output: list[str] = []
    try:
        with subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            show_progress(collect(process.stdout, output), expected)
        if process.returncode:
            raise PipError("".join(output))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with LOG.open("a") as log:
            log.writelines(output)


def collect(lines: Iterable[str], into: list[str]) -> Iterator[str]:
    """Passes lines on and keeps them."""
    for line in lines:
        into.append(line)
        yield line


def show_progress(lines: Iterable[str], expected: int) -> None:
    """Counts the packages that pip reaches; one line on a terminal, now and then elsewhere."""
    live = sys.stderr.isatty()
    started_s = time.monotonic()
    reached = 0
    for line in lines:
        package = _REACHED.match(line)
        if package:
            reached += 1
            shown = f"  {reached}/{expected} {package[1]}"
            if expected and live:
                print(f"\r{shown:<70.70}", end="", file=sys.stderr, flush=True)
            elif expected and reached % 40 == 0:
                say(shown)
        elif expected and line.startswith("Installing collected packages"):
            elapsed_s = time.monotonic() - started_s
            start = "\r" if live else ""
            say(f"{start}{f'  unpacking them, after {elapsed_s:.0f} s of downloads':<70}")


def explain(output: str) -> str:
    """What pip's output means, in one sentence."""
    if os.strerror(errno.ENOSPC) in output or "Disk quota exceeded" in output:
        return disk_full(shutil.disk_usage(ROOT).free)
    missing = _NOT_FOUND.search(output)
    if _UNREACHABLE.search(output):
        return (
            "pip cannot reach its package index: check the network, the proxy and pip's settings "
            f"(pip config list; PIP_INDEX_URL), then run this again (details: {LOG})"
        )
    if missing:
        return (
            f"pip's indexes do not offer {missing[1]} for Python {platform.python_version()}: "
            f"check pip's settings (pip config list; PIP_INDEX_URL) (details: {LOG})"
        )
    errors = [line.strip() for line in output.splitlines() if "error" in line.lower()]
    return f"pip failed with {errors[-1] if errors else 'no word of why'!r} (details: {LOG})"


@contextmanager
def alone() -> Iterator[None]:
    """Lets one set-up of this checkout run at a time."""
    with open(ROOT / "Makefile") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another set-up of this checkout")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Makes the environment and says in one sentence what prevents it."""
    try:
        with alone():
            make()
    except SetupError as error:
        say(str(error))
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        say(disk_full(shutil.disk_usage(ROOT).free))
        return 2
    except KeyboardInterrupt:
        say("Interrupted; run it again to go on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
