"""One module per command: its name is the command's, its `command` is what runs.

A module is imported when its command runs or its help is shown (main.LazyGroup). torch and
transformers take seconds to import: modules that need them are imported inside the functions of
build, eval, plan and `verify --deep`.
"""
