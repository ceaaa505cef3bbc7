"""torch: that what stands beside it was built for the same device, and its stale build locks."""

from __future__ import annotations

import os
import re
import sys
import time
from importlib.metadata import Distribution
from pathlib import Path

from trimtab.cli.checks.finding import Finding, error, ok, warning
from trimtab.cli.checks.installations import find
from trimtab.cli.checks.other_process import CallFailed, call

COMPANIONS = ("torchvision", "torchaudio")
STALE_AFTER_S = 600.0


def companions() -> list[Finding]:
    """Whether torchvision and torchaudio fit the torch that is installed.

    transformers, and so vLLM, imports them where it finds them: a wrong one breaks both.
    """
    torch = find("torch")
    if torch is None:
        return []
    device = _device(torch)
    found: list[Finding] = []
    for name in COMPANIONS:
        companion = find(name)
        if companion is not None:
            found.append(_companion(companion, torch, device))
    return found


def _companion(companion: Distribution, torch: Distribution, torch_device: str) -> Finding:
    name = companion.name
    shown = f"{name} {companion.version}"
    fix = f"pip uninstall {name} (nothing here needs it), or install the one of the same index"
    label = _label(companion)
    if label and label != torch_device:
        what = f"{shown} is built for {label}, beside torch {torch.version} for {torch_device}"
        return error("torch", what, fix)
    try:
        call(f"{__name__}:import_module", name)
    except CallFailed as failure:
        what = f"{shown} does not import beside torch {torch.version} ({failure})"
        return error("torch", what, fix)
    return ok("torch", f"{shown} imports beside torch")


def import_module(name: str) -> None:
    """Imports a module and forgets it."""
    __import__(name)


def _device(torch: Distribution) -> str:
    """What torch says it was built for: ``cpu``, ``cuda``, ``rocm``, as in its version.py."""
    try:
        text = Path(str(torch.locate_file("torch/version.py"))).read_text(encoding="utf-8")
    except OSError:
        return _label(torch) or "an unknown device"
    for name, device in (("cuda", "cuda"), ("hip", "rocm"), ("xpu", "xpu")):
        if re.search(rf"^{name}\b[^=\n]*= *['\"]", text, re.MULTILINE):
            return device
    return "cpu"


def _label(distribution: Distribution) -> str:
    """The device in a version's local part, e.g. ``cuda`` for 2.13.0+cu128; empty without one."""
    local = distribution.version.partition("+")[2]
    for prefix, device in (("cpu", "cpu"), ("cu", "cuda"), ("rocm", "rocm"), ("xpu", "xpu")):
        if local.startswith(prefix):
            return device
    return ""


def stale_build_locks() -> list[Finding]:
    """Locks in torch's extension cache that no process holds; who waits for one waits forever.

    torch keeps the lock's file open while it builds, so a lock that is open nowhere on this
    machine is left over from a build that was killed: an old one for sure, a young one unless
    another machine shares the folder and is building.
    """
    ages = {path: age for path in _locks(extension_cache()) if (age := _age_s(path)) is not None}
    held = _open_files() if ages else set()
    return [
        _left(path, age)
        for path, age in ages.items()
        if os.path.realpath(path) not in held and (age > STALE_AFTER_S or Path("/proc").is_dir())
    ]


def _left(path: Path, age_s: float) -> Finding:
    check, since = "torch extensions", f"{path} is {_words(age_s)} old"
    fate = "every later build there, such as DeepSpeed's, waits for it forever"
    if age_s > STALE_AFTER_S:
        what = f"{since} and was left by a build that was killed; {fate}"
        return error(check, what, f"rm {path}")
    return warning(
        check,
        f"{since} and open in no process here; if a build was killed, {fate}",
        f"rm {path}, unless another machine shares the folder and is building",
    )


def _words(age_s: float) -> str:
    if age_s < 2 * 60:
        return f"{age_s:.0f} s"
    return f"{age_s / 60:.0f} min" if age_s < 2 * 3600 else f"{age_s / 3600:.0f} h"


def extension_cache() -> Path:
    """Where torch builds its extensions."""
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    if own:
        return Path(own)
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/torch_extensions"
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(shared).expanduser() / "torch_extensions"


def _locks(root: Path) -> list[Path]:
    # One folder for each extension, below one for each Python and device in the default place.
    return sorted({*root.glob("*/lock"), *root.glob("*/*/lock")})


def _age_s(path: Path) -> float | None:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:  # released meanwhile
        return None


def _open_files() -> set[str]:
    """The files that some process of this machine has open, where /proc shows them."""
    found: set[str] = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.add(os.readlink(link))
        except OSError:  # another user's process, or one that just ended
            continue
    return found
