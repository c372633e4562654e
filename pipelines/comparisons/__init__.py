"""Many sequences side by side: cells, their records and the table."""
