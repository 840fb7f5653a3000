"""Whether data sets can be read from the hub."""

from __future__ import annotations

import os
from functools import cache

from quantkit.io.hub_client import HubBudget, bound_hub
from quantkit.texts.hub_data import DataSetFault, translate_library_faults

PROBE = "Salesforce/wikitext"
"""A small data set that the shipped mixtures use."""
TIMEOUT = 10.0


@cache
def find_hub_fault() -> str:
    """Return why the hub's data sets cannot be read, or "". Asks the hub once per process."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    budget = HubBudget(n_bytes=8_000_000, n_requests=8, seconds=2 * TIMEOUT)
    try:
        with translate_library_faults(), bound_hub(budget, allows_xet=False):
            HfApi().dataset_info(PROBE, timeout=TIMEOUT)
    except DataSetFault as fault:
        endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
        return f"{endpoint} does not answer ({str(fault):.100})"
    return ""
