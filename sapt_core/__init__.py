"""SAPT on Ray: what is computed."""

__version__ = "0.1.0"
