"""What architectures are made of: attention, MLPs and routed experts as tables of linears."""
