"""Paths inside an artifact, relative to its folder, and the schema versions of its files.

An artifact is a checkpoint in Hugging Face's layout (the names that `checkpoint.file_names` holds)
with the recipe and the folder `quantkit/`, which holds everything that quantkit adds. No other
module spells these paths.
"""

from __future__ import annotations

from typing import Final

from quantkit.checkpoint.file_names import CONFIG as CONFIG
from quantkit.checkpoint.file_names import GENERATION_CONFIG as GENERATION_CONFIG
from quantkit.checkpoint.file_names import INDEX as INDEX
from quantkit.checkpoint.file_names import MODEL_CARD as MODEL_CARD
from quantkit.checkpoint.file_names import SINGLE as SINGLE

RECIPE = "recipe.yaml"

EVIDENCE_FOLDER = "quantkit/"
MANIFEST = "quantkit/manifest.json"
PLAN = "quantkit/plan.json"
FIDELITY = "quantkit/fidelity.json"
PAGE = "quantkit/fidelity.html"
TIMINGS = "quantkit/timings.json"
SIGNATURE = "quantkit/signature.json"
LOADTEST = "quantkit/loadtest.json"
LOADTEST_PAGE = "quantkit/loadtest.html"

SAMPLES_FOLDER = "quantkit/samples/"
TOKEN_SAMPLES = "quantkit/samples/tokens.parquet"
SOLUTION_SAMPLES = "quantkit/samples/solutions.parquet"
BENCHMARK_SAMPLES = "quantkit/samples/benchmarks.parquet"

UNHASHED = frozenset({TIMINGS})
"""Files that the manifest lists without a hash: figures that depend on the clock or the machine's
load.
"""

ADDED_LATER = (LOADTEST, LOADTEST_PAGE)
"""Files that `quantkit loadtest` adds on other machines: neither the manifest nor the signature
covers them.
"""

SCHEMA_VERSION: Final = 1
"""`schema_version` of the manifest."""
FIDELITY_VERSION: Final = 1
"""`version` of fidelity.json."""
LOADTEST_VERSION: Final = 1
"""`version` of loadtest.json."""
