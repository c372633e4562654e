"""Continual-learning methods, a file each, found by their names (``sapt_core.methods.base``)."""
