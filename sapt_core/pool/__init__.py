"""Blocks, the attention that mixes them, and both on a backbone. Nothing here trains, scores or stores."""
