"""quantkit: one recipe in, one quantized safetensors artifact out, with the evidence of what it lost."""

__version__ = "0.1.0"
