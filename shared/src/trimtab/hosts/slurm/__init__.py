"""The Slurm host: the order of an srun step's tasks, and the hosts of an allocation."""

from trimtab.hosts.slurm.allocation import allocated, check_allocation
from trimtab.hosts.slurm.launching import variables, with_hosts

__all__ = ["allocated", "check_allocation", "variables", "with_hosts"]
