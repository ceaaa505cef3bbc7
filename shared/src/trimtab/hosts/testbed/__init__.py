"""Networks of several hosts on one machine: Linux network namespaces joined by shaped links.

What a plan promises of a network can be tried on them with real processes.
"""

from trimtab.hosts.testbed.tree_network import TreeNetwork, obstacle, two_tiers

__all__ = ["TreeNetwork", "obstacle", "two_tiers"]
