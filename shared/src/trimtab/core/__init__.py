"""The planning core: cluster, model, workload, cost, solve, simulate, plan, and no framework."""
