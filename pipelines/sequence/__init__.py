"""One sequence of tasks: its checked experiment, its graph of stages, what each stage computes."""
