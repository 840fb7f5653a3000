"""Test of `quantkit serve --engine vllm` on this CPU, through a gateway, with OpenAI's client.

    PYTHONPATH=tests .venv/bin/python -m external.vllm_cpu.served .venv-vllm/bin/python [ARTIFACT]

Sends the requests of `make demo-serve`, and checks vLLM's counters of prefix cache hits. Builds
tiny-v3's artifact if none is named.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import openai
from tools.demo_serve import PROMPT, check, print_result, send_requests, serve_artifact

from quantkit.serve.loadtest.engine import get_base_url, read_cache_counters

COMMAND = Path(__file__).parent / "command.py"
UNMEASURED = ["--skip-evaluation", "--set", "fidelity=none", "--set", "gates={}"]
BUILD = [sys.executable, "-m", "quantkit", "build", "tiny-v3-awq4", *UNMEASURED]
ENGINE_FLAGS = [
    "--dtype",
    "bfloat16",
    "--enforce-eager",
    "--compilation-config",
    '{"custom_ops": ["none"]}',
]
"""The settings of generate.py."""
OPTIONS = ["--engine", "vllm", "--context", "512", "--users", "4"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""tiny-v3 has no chat template."""


def put_vllm_on_path(folder: Path, vllm_python: str) -> None:
    """Put a program named vllm first on PATH."""
    program = folder / "vllm"
    words = shlex.join([str(Path(vllm_python).absolute()), str(COMMAND.absolute())])
    program.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def main(vllm_python: str, artifact: str = "") -> None:
    """Serve the artifact, send requests, stop. Raises SystemExit if an answer violates the API."""
    os.environ.setdefault("NO_PROXY", "127.0.0.1")
    with tempfile.TemporaryDirectory() as name:
        put_vllm_on_path(Path(name), vllm_python)
        if not artifact:
            artifact = f"{name}/tiny-v3-awq4"
            subprocess.run([*BUILD, "--set", f"output.path={artifact}"], check=True)
        template = Path(name) / "template.jinja"
        template.write_text(TEMPLATE, encoding="utf-8")
        options = [*OPTIONS, "--chat-template", str(template), "--", *ENGINE_FLAGS]
        with (
            serve_artifact(artifact, *options) as engine,
            serve_artifact(engine, "--gateway") as url,
        ):
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
            send_requests(client)
            for _ in range(
                2
            ):  # a prompt longer than one cache block, which has 128 tokens on a CPU
                client.completions.create(
                    model=client.models.list().data[0].id, prompt=PROMPT * 8, max_tokens=1
                )
            counters = read_cache_counters(get_base_url(engine))
    check(
        counters is not None and 0 < counters.hits < counters.asked,
        "the engine reports prefix cache hits",
    )
    print_result("prefix cache", counters)


if __name__ == "__main__":
    main(*sys.argv[1:])
