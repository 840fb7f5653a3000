"""Whether data sets can be read from the hub."""

from __future__ import annotations

import os
from functools import cache

from quantkit.texts.corpus_spec import get_first_line

PROBE = "Salesforce/wikitext"
"""A small data set that the shipped mixtures use."""
TIMEOUT = 10.0


@cache
def find_hub_fault() -> str:
    """Return why the hub's data sets cannot be read, or "". Asks the hub once per process."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi().dataset_info(PROBE, timeout=TIMEOUT)
    # transport libraries of huggingface_hub's versions share no base class of their errors
    except Exception as error:  # noqa: BLE001  # whatever it is, the hub gives no text
        endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
        return f"{endpoint} does not answer ({get_first_line(error):.100})"
    return ""
