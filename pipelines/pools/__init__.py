"""What ``sapt pool`` does with versions, a file an action."""
