"""Answers and what they are worth: decoding, scores, analysis, plots. Nothing here changes a pool."""
