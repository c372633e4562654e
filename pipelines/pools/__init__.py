"""What ``pipelines/pool.py`` does with registered versions, a file an action."""
