"""Shared parts of formats: packing limits, GPTQ tensors, engine module names, checks."""
