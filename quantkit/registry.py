"""What can be named in a recipe: the methods, roundings, formats and architectures that quantkit carries.

The file name is the registration: `methods/awq.py` holds `METHOD`, and is found because it is there. Nothing is
imported until it is asked for, so that `--help` stays fast and a broken optional dependency hurts its own plug-in only.
"""

from __future__ import annotations

import importlib
import pkgutil
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


def list_names(kind: Kind) -> tuple[str, ...]:
    """Every name of a kind, sorted; imports none of them."""
    modules = pkgutil.iter_modules(_PACKAGES[kind].__path__)
    return tuple(sorted(module.name for module in modules if not module.ispkg))


def get_method(name: str) -> Method:
    """The method in methods/<name>.py; UsageError when there is none."""
    return _load_plugin("methods", name, "METHOD", Method)


def get_rounding(name: str) -> Rounding:
    """The rounding in roundings/<name>.py; UsageError when there is none."""
    return _load_plugin("roundings", name, "ROUNDING", Rounding)


def get_format(name: str) -> Format:
    """The format in formats/<name>.py; UsageError when there is none."""
    return _load_plugin("formats", name, "FORMAT", Format)


def get_checks(format_name: str) -> FormatChecks:
    """What `quantkit verify` must know of the format in formats/<name>.py; UsageError when there is none."""
    return _load_plugin("formats", format_name, "CHECKS", FormatChecks)


def get_architecture(model_type: str) -> Architecture:
    """The architecture in architectures/<model_type>.py; UsageError when there is none."""
    return _load_plugin("architectures", model_type, "ARCHITECTURE", Architecture)


def check_packages(format_name: str) -> None:
    """UsageError when a format computes with a package that is not installed: before any weight is read."""
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
        found = "nothing" if plugin is None else f"a {type(plugin).__name__}"
        raise QuantkitError(
            f"quantkit/{kind}/{name}.py: {attribute}: expected a {expected.__name__}, found {found}; "
            f"a file in quantkit/{kind}/ must set {attribute}"
        )
    return plugin


def _import_module(kind: Kind, name: str) -> ModuleType:
    try:
        return importlib.import_module(f"quantkit.{kind}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "quantkit":
            raise  # a mistake in our own imports: aloud
        raise UsageError(
            f"{kind.removesuffix('s')} {name!r} needs the package {error.name!r}, which is not installed; "
            "install it, or choose another"
        ) from error
