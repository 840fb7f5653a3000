"""Remotes: one file per URL scheme, found by its name.

Each sets `REMOTE`, a `quantkit.publish.remote.RemoteScheme`. `file.py` also opens plain folders,
`hf.py` also owner/name, and `fsspec.py` every other scheme that fsspec supports.
"""
