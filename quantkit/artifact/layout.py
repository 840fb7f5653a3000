"""Paths inside an artifact, relative to its folder, and the schema versions of its files.

An artifact is a checkpoint in Hugging Face's layout (the names that `checkpoint.file_names` holds)
with the recipe and the folder `quantkit/`, which holds everything that quantkit adds. No other
module spells these paths.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

from quantkit.checkpoint.file_names import CHAT_TEMPLATES as CHAT_TEMPLATES
from quantkit.checkpoint.file_names import CONFIG as CONFIG
from quantkit.checkpoint.file_names import GENERATION_CONFIG as GENERATION_CONFIG
from quantkit.checkpoint.file_names import INDEX as INDEX
from quantkit.checkpoint.file_names import MODEL_CARD as MODEL_CARD
from quantkit.checkpoint.file_names import SINGLE as SINGLE
from quantkit.checkpoint.folder_rules import (
    MODULES,
    describe_foreign_file,
    find_weight_set_faults,
    is_module_config,
    is_module_weights,
    is_sidecar,
    is_weight_file,
)
from quantkit.io.path_safety import find_name_faults

RECIPE = "recipe.yaml"

EVIDENCE_FOLDER = "quantkit/"
MANIFEST = "quantkit/manifest.json"
PLAN = "quantkit/plan.json"
FIDELITY = "quantkit/fidelity.json"
PAGE = "quantkit/fidelity.html"
BOM = "quantkit/bom.cdx.json"
"""The artifact as a CycloneDX ML-BOM."""
TIMINGS = "quantkit/timings.json"
SIGNATURE = "quantkit/signature.json"
LOADTEST = "quantkit/loadtest.json"
LOADTEST_PAGE = "quantkit/loadtest.html"
"""Written by older versions; an artifact no longer holds it, since nothing can vouch for a page."""

SAMPLES_FOLDER = "quantkit/samples/"
TOKEN_SAMPLES = "quantkit/samples/tokens.parquet"
TEXT_SAMPLES = "quantkit/samples/text.parquet"
"""The fidelity text, a row per token."""
PREDICTION_SAMPLES = "quantkit/samples/predictions.parquet"
"""The most probable tokens of source and artifact where their KL is largest."""
SOLUTION_SAMPLES = "quantkit/samples/solutions.parquet"
BENCHMARK_SAMPLES = "quantkit/samples/benchmarks.parquet"

UNHASHED = frozenset({TIMINGS})
"""Files that the manifest lists without a hash: figures that depend on the clock or the machine's
load.
"""

ADDED_LATER = (LOADTEST,)
"""Files that `quantkit loadtest` adds on other machines: neither the manifest nor the signature
covers them, so that only figures with a schema may be among them, no page.
"""

OWN_FILES = frozenset({
    *(
        CONFIG,
        MODEL_CARD,
        RECIPE,
        MANIFEST,
        PLAN,
        FIDELITY,
        PAGE,
        BOM,
        TIMINGS,
        SIGNATURE,
        LOADTEST,
    ),
    *(TOKEN_SAMPLES, TEXT_SAMPLES, PREDICTION_SAMPLES, SOLUTION_SAMPLES, BENCHMARK_SAMPLES),
})
"""Every file of an artifact but its weights and the source's sidecars."""

SCHEMA_VERSION: Final = 1
"""`schema_version` of the manifest."""
FIDELITY_VERSION: Final = 2
"""`version` of fidelity.json."""
LOADTEST_VERSION: Final = 2
"""`version` of loadtest.json."""


def find_layout_faults(names: Collection[str]) -> Iterator[str]:
    """Yield why files of these names, relative to the folder, are not those of an artifact.

    Names are safe and portable, every file is of an allowed kind, and there is one set of weights.
    """
    yield from find_name_faults(names)
    for name in sorted(names):
        if name not in OWN_FILES and not is_weight_file(name) and not is_sidecar(name):
            yield f"{name}: {describe_foreign_file(name)}"
        elif (is_module_config(name) or is_module_weights(name)) and MODULES not in names:
            yield f"{name}: a file of a module without the {MODULES} that names it"
    yield from find_weight_set_faults(names)
