"""Running a sequence: where, watched on the console and published to MLflow."""
