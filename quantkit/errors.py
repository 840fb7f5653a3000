"""Every error quantkit raises on purpose, with the exit code the command line turns it into.

    QuantkitError                1   something went wrong while doing what was asked
    ├── UsageError               2   the command line or the environment was used wrongly
    │   └── RecipeError          2   a recipe cannot be read, or its plan is refused; lists every fault
    ├── CheckpointError          1   the source checkpoint is missing, damaged or not what it claims
    │   └── HubUnreachable       1   the hub did not answer; whether the model is good is not known
    ├── CalibrationError         1   calibration or evaluation text cannot be used
    ├── NumericsError            1   a computation left the range in which its result can be trusted
    ├── EvaluationError          1   a benchmark could not be run
    │   └── UnsuitedError        1   a task that this model cannot be asked; others may be
    ├── ArtifactError            1   an artifact is missing, damaged or does not match its manifest
    ├── TransferError            1   an artifact could not be published or pulled
    ├── NotComparable            1   two artifacts were measured on other sources, texts or prompts
    └── GateMissed               3   the artifact is complete but misses a gate of its recipe

A message says where (file, key, tensor), what was expected, what was found and what to do. Faults that can be found
together are collected and raised once.
"""

from __future__ import annotations

from collections.abc import Sequence


class QuantkitError(Exception):
    """Root of the tree; `cli` turns it into one message and an exit code."""

    exit_code = 1


class UsageError(QuantkitError):
    """The command line or the environment was used wrongly."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be read or planned; `faults` holds one sentence each."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


class CheckpointError(QuantkitError):
    """The source checkpoint is missing, damaged or not what it claims to be."""


class HubUnreachable(CheckpointError):
    """The hub did not answer: whether the model is good is not known, so a plan may go by the published config."""


class CalibrationError(QuantkitError):
    """Calibration or evaluation text cannot be used."""


class NumericsError(QuantkitError):
    """A computation left the range in which its result can be trusted."""


class EvaluationError(QuantkitError):
    """A benchmark could not be run."""


class UnsuitedError(EvaluationError):
    """A task that this model, or this way of asking it, cannot answer; others may be asked."""


class ArtifactError(QuantkitError):
    """An artifact is missing, damaged or does not match its manifest."""


class TransferError(QuantkitError):
    """An artifact could not be published or pulled: the place, the way there, or what lies there."""


class NotComparable(QuantkitError):
    """Two artifacts were measured on other sources, texts or prompts: their figures say nothing about each other."""


class GateMissed(QuantkitError):
    """The artifact is complete but misses a gate, or has no figure for one that it is to be judged by."""

    exit_code = 3
