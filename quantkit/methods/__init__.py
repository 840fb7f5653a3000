"""Methods: how codes are chosen; one file each, named as in a recipe."""
