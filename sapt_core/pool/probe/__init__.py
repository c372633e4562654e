"""What a backbone does with blocks on it, looked at before anything is trained: without weights, then on them."""
