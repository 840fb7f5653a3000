"""Settings of the numerical libraries, which read them from the environment when they load."""

from __future__ import annotations

import os

REPRODUCIBLE = {"MKL_CBWR": "AVX2,STRICT", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Settings of the linear algebra libraries: results do not depend on the number of threads."""

BOUNDED = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
"""Bounds of caches that would grow with a build.

oneDNN and torch keep the code generated for each shape of a product, and every expert has another
number of tokens. With the default of 1,024 shapes a build grew by 14 MB per block, with these by 3.
"""


def apply_settings() -> None:
    """Set the environment variables that are not set yet; must run before torch is imported."""
    for name, value in {**REPRODUCIBLE, **BOUNDED}.items():
        os.environ.setdefault(name, value)
