"""One file per command of the program: the file's name is the command's, its `command` is what runs.

All are loaded at every start: heavy imports belong into the functions.
"""
