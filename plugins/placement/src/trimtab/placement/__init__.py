"""Training ranks laid onto the network: which node runs which, so that groups stay close."""

from trimtab.placement.job_check import JobCheck, check_job

__all__ = ["JobCheck", "check_job"]
