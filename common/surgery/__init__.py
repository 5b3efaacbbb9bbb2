"""Inheritance of weights: axes name dimensions, plans map rows of a donor to rows of a student, grafts apply the
plans.
"""
