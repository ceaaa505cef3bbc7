"""``python -m trimtab.cli``, for where the ``trimtab`` script is not on the path."""

from trimtab.cli.command_line import main

main()
