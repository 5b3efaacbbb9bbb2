"""Inheritance of weights: axes name dimensions, plans map donor rows to student rows, grafts apply plans."""
