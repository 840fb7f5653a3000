"""Serve an artifact, load-test it with GuideLLM, and store the result next to its report.

    PYTHONPATH=tests python -m tools.demo_load ARTIFACT GUIDELLM

Works on a copy of the artifact in a temporary folder, which must still verify. Exits with 1 if a
check fails.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools import demo_serve


def main(artifact: Path, program: str, levels: str = "1,2,4") -> None:
    quantkit = [sys.executable, "-m", "quantkit"]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(artifact, Path(folder) / artifact.name))
        with demo_serve.serve_artifact(copy, "--engine", "transformers", "--gateway") as url:
            options = [
                "--concurrency",
                levels,
                "--requests",
                "16",
                "--max-tokens",
                "24",
                "--guidellm",
                program,
            ]
            page = Path(folder) / "load.html"
            command = [
                *quantkit,
                "loadtest",
                url,
                "--artifact",
                str(copy),
                "--html",
                str(page),
                *options,
            ]
            subprocess.run(command, check=True)
        report = json.loads((copy / "quantkit/loadtest.json").read_text(encoding="utf-8"))
        demo_serve.check(
            [level["concurrency"] for level in report["levels"]] == [*map(int, levels.split(","))],
            "all levels",
        )
        demo_serve.check(
            all(level["errored"] == 0 for level in report["levels"]), "no request failed"
        )
        demo_serve.check(
            all(level["output_tokens"] == 24 for level in report["levels"]),
            "all answers have 24 tokens",
        )
        demo_serve.check(page.stat().st_size > 500_000, "the page has plots")
        subprocess.run([*quantkit, "verify", str(copy)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
