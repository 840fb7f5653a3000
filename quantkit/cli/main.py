"""The command line: a command per file of commands/.

Exit codes: 0 done, 1 a failure, 2 usage or recipe, 3 a missed gate.
"""

from __future__ import annotations

import os
import pkgutil
from importlib import import_module

import click

from quantkit import __version__
from quantkit.cli import commands

REPRODUCIBLE = {"MKL_CBWR": "AVX2,STRICT", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""What the linear algebra libraries must be told before they load, so that the number of threads changes no bit."""
BOUNDED = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
"""The same, so that memory stays the same: oneDNN and torch keep the code made for each shape of a product, and every
expert has another number of tokens. With their 1,024 shapes each a build grew by 14 MB a block, with these by 3."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantkit")
def main() -> None:
    """One recipe in, one quantized safetensors artifact out, with the evidence of what it lost.

    Example: quantkit build tiny-v3-awq4
    """
    for name, value in {**REPRODUCIBLE, **BOUNDED}.items():
        os.environ.setdefault(name, value)


for found in pkgutil.iter_modules(commands.__path__):
    main.add_command(import_module(f"{commands.__name__}.{found.name}").command, found.name)


if __name__ == "__main__":
    main()
