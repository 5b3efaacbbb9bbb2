"""Inheritance as data: axes name dimensions, plans say which rows go where, grafts carry them out."""
