"""What one training run needs: loop, loss terms, generator, rehearsal. Methods and versions are above it."""
