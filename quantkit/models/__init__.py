"""transformers' layers and models: run block by block, scaled, and derived without a table."""
