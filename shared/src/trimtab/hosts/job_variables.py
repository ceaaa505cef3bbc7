"""The environment variables by which a launch speaks to the ranks of its job."""

HOST_VARIABLE = "TRIMTAB_HOST"
"""The name by which a plan knows this machine, where it is not its host name."""

PLAN_VARIABLE = "TRIMTAB_PLAN"
"""The plan that a job was launched with; it is set on every host."""

STRICT_VARIABLE = "TRIMTAB_STRICT"
"""Set to 1, a job that does not lie where its plan says is refused."""

CHECK_VARIABLE = "TRIMTAB_CHECK"
"""Set to 0, a job with a plan is not looked at from inside before its first step."""

BACKEND_VARIABLE = "TRIMTAB_BACKEND"
"""The backend of torch.distributed that DeepSpeed takes where its script names none."""
