"""Bytes and where they lie: blobs by digest, files that appear whole, addresses without secrets, what ships with us."""
