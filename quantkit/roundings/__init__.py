"""Roundings: how weights become codes; one file each, named as in a recipe."""
