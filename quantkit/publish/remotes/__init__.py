"""Where artifacts are published to and pulled from: a file per URL scheme, found by its name.

Each sets `REMOTE`, a `quantkit.publish.remote.RemoteScheme`. `file.py` is also a plain folder, `hf.py` also owner/name, and
`other.py` every scheme that has no file of its own and that fsspec knows.
"""
