"""All that imports Ray: its session, and stages as tasks, on Ray Train workers and under Ray Tune."""
