"""Figures of artifacts in experiment trackers: MLflow and Weights & Biases."""
