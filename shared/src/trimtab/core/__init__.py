"""The planning core: cluster, model, workload, cost, solve, simulate, plan; it knows no framework."""
