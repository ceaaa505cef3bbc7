"""The planning core: clusters, models, workloads, costs, solvers, simulators and plans; it knows no framework."""
