"""The errors that quantkit raises, with the exit code that the command line gives them.

    QuantkitError                1   a step failed
    ├── UsageError               2   wrong use of the command line or the environment
    │   └── RecipeError          2   a recipe cannot be read or planned; lists every fault
    ├── CheckpointError          1   the source checkpoint is missing, damaged or inconsistent
    │   └── HubUnreachable       1   the hub did not answer; the model was not checked
    ├── CalibrationError         1   calibration or evaluation text cannot be used
    ├── NumericsError            1   a computation left the range of a reliable result
    ├── EvaluationError          1   a benchmark could not be run
    │   ├── UnsuitedError        1   a task that does not suit this model; others may
    │   └── UntrustedCode        1   Python of a task that the user has not trusted by its hash
    ├── ArtifactError            1   an artifact is missing, damaged or differs from its manifest
    ├── TransferError            1   an artifact could not be published or pulled
    ├── NotComparable            1   two artifacts have different sources, texts or prompts
    └── GateMissed               3   the artifact is complete but misses a gate of its recipe

A message names the place (file, key, tensor), the expected and the actual value, and the remedy.
Faults that one pass can find together are collected and raised once.
"""

from __future__ import annotations

from collections.abc import Sequence


class QuantkitError(Exception):
    """Base class; `cli` turns it into one message and an exit code."""

    exit_code = 1


class UsageError(QuantkitError):
    """Wrong use of the command line or the environment."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe cannot be read or planned; `faults` has one sentence per fault."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


class CheckpointError(QuantkitError):
    """The source checkpoint is missing, damaged or inconsistent."""


class HubUnreachable(CheckpointError):
    """The hub did not answer: the model was not checked; a plan may use the published config."""


class CalibrationError(QuantkitError):
    """Calibration or evaluation text cannot be used."""


class NumericsError(QuantkitError):
    """A computation left the range in which its result is reliable."""


class EvaluationError(QuantkitError):
    """A benchmark could not be run."""


class UnsuitedError(EvaluationError):
    """A task does not suit this model or this backend; other tasks may."""


class UntrustedCode(EvaluationError):
    """A task has Python of its own that the user does not trust."""


class ArtifactError(QuantkitError):
    """An artifact is missing, damaged or differs from its manifest."""


class TransferError(QuantkitError):
    """An artifact could not be published or pulled: remote, network, or files on the remote."""


class NotComparable(QuantkitError):
    """Two artifacts have different sources, texts or prompts: figures are not comparable."""


class GateMissed(QuantkitError):
    """The artifact is complete but misses a gate, or has no figure for one of its gates."""

    exit_code = 3
