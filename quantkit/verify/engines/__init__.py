"""How engines map the tensors of an artifact to the parameters of their models."""
