"""The keys of `quantize` in a recipe: the scheme of a quantized matrix, as a frozen model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from quantkit import registry
from quantkit.contracts import FALLBACK_ROUNDING
from quantkit.recipe.value_types import FROZEN, MethodName, RoundingName, describe

DEFAULT_METHOD = "awq"
METHOD_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "awq": {"rounding": "gptq"},
    "gptq": {"rounding": "gptq"},
    "nf4": {
        "rounding": "nearest", "bits": 4, "group_size": 64, "symmetric": True,
        "scale_dtype": "auto", "double_quant": True,
    },
}  # fmt: skip
"""Values that follow from a method, so that a recipe can omit them; for nf4 only double_quant may
differ.
"""

SCHEME_METHOD = "gptq"
"""The default method of FP4: AWQ scaling before GPTQ gains nothing there (numerics/README.md)."""
SCHEME_VALUES: Mapping[str, Mapping[str, object]] = {
    "mxfp4": {"bits": 4, "group_size": 32, "symmetric": True, "scale_dtype": "auto"},
    "nvfp4": {"bits": 4, "group_size": 16, "symmetric": True, "scale_dtype": "auto"},
}
"""Fixed values of the FP4 schemes."""


def format_values(values: Mapping[str, object]) -> str:
    """Return keys and values as a recipe writes them: "bits: 4, symmetric: true"."""
    return ", ".join(f"{key}: {str(value).lower()}" for key, value in values.items())


class Quantize(BaseModel):
    """The scheme of a quantized matrix: the default, or with the changes of a rule."""

    model_config = FROZEN
    method: Annotated[
        MethodName,
        describe("Quantization method: a module of quantkit/methods/.", "gptq"),
    ] = DEFAULT_METHOD
    rounding: Annotated[
        RoundingName,
        describe(
            "How codes are chosen after the method's scaling. `gptq` compensates the error of a "
            "column in the next columns, then refines codes and scales by coordinate descent. "
            "`gptq_once` omits the refinement: half of the time, slightly larger error. Methods "
            "awq and gptq: default `gptq`; gptq: never `nearest`.",
            "gptq",
        ),
    ] = FALLBACK_ROUNDING
    scheme: Annotated[
        Literal["int", "mxfp4", "nvfp4"],
        describe(
            "Codes: integers, or FP4 (E2M1) with a scale per group: `mxfp4` has powers of two for "
            "32 weights, `nvfp4` FP8 scales for 16 weights and one factor per matrix. bits, "
            "group_size, symmetric and scale_dtype of FP4 are fixed, the default method is gptq, "
            "and format compressed_tensors stores it.",
            "nvfp4",
        ),
    ] = "int"
    bits: Annotated[int, Field(ge=2, le=8), describe("Bits of a weight's code.", "8")] = 4
    group_size: Annotated[
        Literal[16, 32, 64, 128, -1],
        describe(
            "Consecutive weights of a row that share a scale; `-1` is the whole row, `16` that of "
            "scheme nvfp4 alone.",
            "64",
        ),
    ] = 128
    symmetric: Annotated[
        bool,
        describe("Store no zero points: the range of a group is [-max, max].", "true"),
    ] = False
    scale_dtype: Annotated[
        Literal["auto", "bfloat16", "float16"],
        describe("Dtype of the scales; `auto` follows the source.", "float16"),
    ] = "auto"
    double_quant: Annotated[
        bool | None,
        describe(
            "Method nf4 only, where the default is `true` and the values of bits, group_size, "
            "symmetric and scale_dtype are fixed: store the scales of the blocks in 8 bits.",
            "false",
        ),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _own_values(cls, values: object) -> object:
        """Add the values that follow from the method and the scheme."""
        if not isinstance(values, dict):
            return values
        fixed = SCHEME_VALUES.get(str(values.get("scheme")))
        values = values if fixed is None else {"method": SCHEME_METHOD, **fixed, **values}
        return {**METHOD_DEFAULTS.get(str(values.get("method", DEFAULT_METHOD)), {}), **values}

    @model_serializer(mode="wrap")
    def omit_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave `scheme` out if it is int, as in recipes before this key: their hash stays."""
        values: dict[str, object] = handler(self)
        return {key: value for key, value in values.items() if (key, value) != ("scheme", "int")}

    def apply_changes(self, changes: Mapping[str, object]) -> dict[str, object]:
        """Return these values with the `changes` of a rule; values of one method or scheme do not
        pass to another.
        """
        left = set[str]()
        for key, table in (("method", METHOD_DEFAULTS), ("scheme", SCHEME_VALUES)):
            before, after = getattr(self, key), str(changes.get(key, getattr(self, key)))
            if before != after:
                left |= {*table.get(before, {}), *table.get(after, {})}
        return {key: value for key, value in self.model_dump().items() if key not in left} | {
            **changes
        }

    @model_validator(mode="after")
    def _nf4_fits(self) -> Quantize:
        if self.method != "nf4":
            if self.double_quant is not None:
                raise ValueError(
                    f"double_quant is for method nf4, found method: {self.method}; leave it out, "
                    "or set method: nf4"
                )
            return self
        fixed = {
            key: value for key, value in METHOD_DEFAULTS["nf4"].items() if key != "double_quant"
        }
        wrong = {key: getattr(self, key) for key in fixed if getattr(self, key) != fixed[key]}
        if wrong:
            expected, actual = format_values(fixed), format_values(wrong)
            raise ValueError(
                f"method nf4 is {expected}, found {actual}; leave that out, or choose another "
                "method"
            )
        if self.double_quant is None:
            raise ValueError(
                "double_quant: method nf4 expects true or false, found nothing; leave it out for "
                "true"
            )
        return self

    @model_validator(mode="after")
    def _scheme_fits(self) -> Quantize:
        if self.scheme == "int":
            if self.group_size == 16:
                raise ValueError(
                    "group_size: 16 is that of scheme nvfp4, integer codes have 32, 64, 128 or -1; "
                    "choose one of them, or set scheme: nvfp4"
                )
            return self
        if self.scheme not in registry.get_method(self.method).kinds:
            raise ValueError(
                f"method {self.method} makes no codes of scheme {self.scheme}; use method gptq, "
                "awq, rtn or rtn_mse"
            )
        fixed = SCHEME_VALUES[self.scheme]
        wrong = {key: getattr(self, key) for key in fixed if getattr(self, key) != fixed[key]}
        if wrong:
            expected, actual = format_values(fixed), format_values(wrong)
            raise ValueError(
                f"scheme {self.scheme} is {expected}, found {actual}; leave that out, or choose "
                "scheme: int"
            )
        return self

    @model_validator(mode="after")
    def _rounding_fits(self) -> Quantize:
        if self.method == "gptq" and self.rounding == "nearest":
            raise ValueError(
                "method gptq is a rounding, found rounding: nearest; set rounding: gptq, or "
                "method: awq for ranges by calibration and codes by plain rounding"
            )
        learns = registry.get_rounding(self.rounding).needs_stats
        if learns and not registry.get_method(self.method).needs_stats:
            raise ValueError(
                f"rounding {self.rounding} learns from calibration, and method {self.method} does "
                "without; set rounding: nearest, or method: gptq"
            )
        return self
