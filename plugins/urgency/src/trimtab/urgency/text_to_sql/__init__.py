"""A multi-stage agent that answers questions with SQL: the workload of the demo and the benchmark.

Seven small databases, questions about them, the agent itself, and a crowd of its users.
"""
