"""Sign, publish and pull artifacts."""
