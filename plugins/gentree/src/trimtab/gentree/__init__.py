"""AllReduce plans for tree networks, made with a cost model that knows incast and memory."""

from trimtab.gentree.planner import Choice, choose, plan_allreduce

__all__ = ["Choice", "choose", "plan_allreduce"]
