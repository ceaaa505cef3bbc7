"""Training ranks laid onto the network: which node runs which, so that groups stay close."""
