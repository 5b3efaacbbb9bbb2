"""Evaluation: retrieval, zero-shot classification, linear probe, FID and related scores."""
