"""Mesh, state, step and loop, shared by all trainers."""
