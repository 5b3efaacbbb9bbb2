"""Scores on held-out data: zero-shot classification, retrieval."""
