"""Registry of plug-ins: the methods, roundings, formats and architectures a recipe can name.

The file name is the registration: `methods/awq.py` sets `METHOD`, and the name is `awq`. A plug-in
is imported on first use, so that `--help` stays fast and a broken optional dependency affects only
its own plug-in.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, TypeVar

from quantkit import architectures, formats, methods, roundings
from quantkit.contracts import Architecture, Format, Method, Rounding
from quantkit.errors import QuantkitError, UsageError
from quantkit.formats.common.checks import FormatChecks
from quantkit.io.suggestions import format_unknown_name

Kind = Literal["methods", "roundings", "formats", "architectures"]

Plugin = TypeVar("Plugin")

_PACKAGES = {
    "methods": methods,
    "roundings": roundings,
    "formats": formats,
    "architectures": architectures,
}


SAME_MODELS: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}
"""Model types that are another one under a name of their own, which transformers does not know."""


def resolve_model_type(model_type: str) -> str:
    """Return the model type that quantkit and transformers know for one of config.json."""
    return SAME_MODELS.get(model_type, model_type)


@cache  # read once per linear by plans and layouts
def list_names(kind: Kind) -> tuple[str, ...]:
    """Return every name of a kind, sorted, without importing a plug-in."""
    modules = pkgutil.iter_modules(_PACKAGES[kind].__path__)
    return tuple(sorted(module.name for module in modules if not module.ispkg))


def get_method(name: str) -> Method:
    """Return the method of methods/<name>.py; raises UsageError if there is none."""
    return _load_plugin("methods", name, "METHOD", Method)


def get_rounding(name: str) -> Rounding:
    """Return the rounding of roundings/<name>.py; raises UsageError if there is none."""
    return _load_plugin("roundings", name, "ROUNDING", Rounding)


def get_format(name: str) -> Format:
    """Return the format of formats/<name>.py; raises UsageError if there is none."""
    return _load_plugin("formats", name, "FORMAT", Format)


def get_checks(format_name: str) -> FormatChecks:
    """Return the checks of formats/<name>.py for `verify`; raises UsageError if there are none."""
    return _load_plugin("formats", format_name, "CHECKS", FormatChecks)


def get_architecture(model_type: str) -> Architecture:
    """Return the architecture of architectures/<model_type>.py; raises UsageError without one."""
    return _load_plugin("architectures", model_type, "ARCHITECTURE", Architecture)


def check_packages(format_name: str) -> None:
    """Check that the packages a format computes with are installed; raises UsageError.

    Builds call it before they read a weight.
    """
    missing = [
        package for package in get_format(format_name).packages if find_spec(package) is None
    ]
    if missing:
        raise UsageError(
            f"format {format_name} needs the package {missing[0]}, which is not installed; "
            f"pip install 'quantkit[{missing[0]}]', or choose another format"
        )


def _load_plugin(kind: Kind, name: str, attribute: str, expected: type[Plugin]) -> Plugin:
    known = list_names(kind)
    if name not in known:
        raise UsageError(format_unknown_name(kind.removesuffix("s"), name, known))
    plugin = getattr(_import_module(kind, name), attribute, None)
    if not isinstance(plugin, expected):
        actual = "nothing" if plugin is None else f"a {type(plugin).__name__}"
        file = "/".join(("quantkit", kind, f"{name}.py"))
        raise QuantkitError(
            f"{file}: {attribute}: expected a {expected.__name__}, "
            f"found {actual}; a file in quantkit/{kind}/ must set {attribute}"
        )
    return plugin


def _import_module(kind: Kind, name: str) -> ModuleType:
    try:
        return importlib.import_module(f"quantkit.{kind}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "quantkit":
            raise  # a wrong import of quantkit itself is a bug
        raise UsageError(
            f"{kind.removesuffix('s')} {name!r} needs the package {error.name!r}, which is not "
            "installed; install it, or choose another"
        ) from error
