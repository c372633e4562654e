"""Frozen backbones: named by content, loaded once a process. Nothing here knows of pools or tasks."""
