"""Weights folders, training states and foreign files."""
