"""Runs that fail: what is said, what is kept of the step, and how to see it again."""
