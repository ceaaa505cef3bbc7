"""The ``trimtab`` command: a module for each command of the core; plugins bring the rest."""

from trimtab.cli.command_line import main

__all__ = ["main"]
