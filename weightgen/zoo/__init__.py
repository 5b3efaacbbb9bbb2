"""Zoos: trained networks with what they were trained on. Small ones trained here, and checkpoints of others."""
