"""Mesh, state, step and loop: what every trainer shares."""
