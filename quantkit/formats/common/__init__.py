"""What formats share: packed words, GPTQ's tensors, engines' names of modules, what stored bytes must be."""
