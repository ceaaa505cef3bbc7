"""The reward signals of branches: from logprobs, from length, and from a reward model."""
