"""Pure tensor mathematics, named as in the papers; README.md holds equations and decisions."""
