"""Many settings of one sequence: the space, its trials and their plots."""
