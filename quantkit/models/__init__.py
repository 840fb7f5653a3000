"""Models as transformers runs them: their layers, scales folded into them, and families that are proven, not tabled."""
