"""The build loop and its steps: learn, fold, solve, store, one block at a time."""
