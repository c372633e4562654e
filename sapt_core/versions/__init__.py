"""Versions of a pool: their format on disk, and what is made of one. Configs and stages are above it."""
