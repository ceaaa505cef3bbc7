# Finds a Python that fits and lets it make the environment (tools/environment.py).
# Any Python may read this file, however old, so it uses nothing new.
import os
import subprocess
import sys

SUPPORTED = ("3.11", "3.12", "3.13")
PROBE = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
HERE = os.path.dirname(os.path.abspath(__file__))


def fits(python):
    """Whether an interpreter runs, is of a supported version, and can make environments."""
    try:
        with open(os.devnull, "w") as devnull:
            version = subprocess.check_output([python, "-c", PROBE], stderr=devnull)
    except (OSError, subprocess.CalledProcessError):
        return False
    return version.decode().strip() in SUPPORTED


def main():
    """Runs tools/environment.py with the first Python that fits: one of .venv, this one, any."""
    own = os.path.join(os.path.dirname(HERE), ".venv", "bin", "python")
    for python in [own, sys.executable] + ["python" + version for version in SUPPORTED]:
        if fits(python):
            script = os.path.join(HERE, "environment.py")
            os.execvp(python, [python, script] + sys.argv[1:])
    version = "%d.%d" % sys.version_info[:2]
    if version in SUPPORTED:
        problem = "Python %s comes without its venv module here: install python%s-venv"
        problem %= (version, version)
    else:
        problem = (
            "trimtab needs Python 3.11, 3.12 or 3.13 and there is only Python %s: install one of "
            "them, or name it, as in make PYTHON=/path/to/python3.11" % version
        )
    sys.stderr.write(problem + "\n")
    sys.exit(2)


main()
