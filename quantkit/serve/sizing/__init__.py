"""Sizing: the memory of a model, GPUs, degrees of parallelism, computed speed bounds.

read_model(target) -> Model               an artifact, a folder or a config.json        read.py
plan_recipe_models(recipe) -> (Model, ..) the artifacts that a recipe will build        read.py
estimate_memory(model, ..)                weights + KV cache + margin                   memory.py
read_gpus() -> GpuCatalog                 the dated, sourced data file of accelerators  gpus.py
fit_model(memory, gpu) -> Fit             number of GPUs, parallelism, longest context,
                                          most users                                    fit.py
compute_bounds(fit) -> Bounds             upper bounds of the speed (roofline)          roofline.py
compute_max_batched_tokens(fit, engine)   tokens per step of a mixture of experts       batch.py

Memory is counted in bytes and printed in decimal units: 1 GB = 10^9 bytes,
1 GiB = 2^30 bytes = 1.074 GB.
"""
