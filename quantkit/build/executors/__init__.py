"""Executors: where the pure functions on slices of experts run."""
