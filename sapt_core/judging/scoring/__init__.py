"""What answers are scored with: a file a kind of metric. ``named`` finds them, ``intervals`` says how sure they are."""
