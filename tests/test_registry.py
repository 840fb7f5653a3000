"""The registry finds plug-ins by file name and names missing packages."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from quantkit import contracts, registry
from quantkit.errors import QuantkitError, UsageError

KINDS: tuple[registry.Kind, ...] = ("methods", "roundings", "formats", "architectures")


def plant(
    monkeypatch: pytest.MonkeyPatch, kind: registry.Kind, name: str, attributes: dict[str, object]
) -> None:
    """Plant a module quantkit/<kind>/<name>.py."""
    module = ModuleType(f"quantkit.{kind}.{name}")
    for key, value in attributes.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(
        registry, "list_names", lambda requested: (name,) if requested == kind else ()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_the_files_of_the_folder(kind: registry.Kind) -> None:
    names = registry.list_names(kind)
    assert names == tuple(sorted(names))
    assert not any(name.startswith("_") for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_every_plugin_loads(kind: registry.Kind) -> None:
    get = {
        "methods": registry.get_method,
        "roundings": registry.get_rounding,
        "formats": registry.get_format,
        "architectures": registry.get_architecture,
    }[kind]
    expected = {
        "methods": contracts.Method,
        "roundings": contracts.Rounding,
        "formats": contracts.Format,
        "architectures": contracts.Architecture,
    }[kind]
    for name in registry.list_names(kind):
        assert isinstance(get(name), expected)


def test_unknown_name_suggests_the_closest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "list_names", lambda kind: ("gptq", "rtn"))
    with pytest.raises(UsageError) as caught:
        registry.get_method("gtpq")
    assert str(caught.value) == "no method named 'gtpq'. Did you mean 'gptq'? Known: gptq, rtn."
    with pytest.raises(UsageError) as caught:
        registry.get_format("zzz")
    assert str(caught.value) == "no format named 'zzz'. Known: gptq, rtn."


def test_plugin_without_its_attribute_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "methods", "hollow", {})
    with pytest.raises(QuantkitError) as caught:
        registry.get_method("hollow")
    assert str(caught.value) == (
        "quantkit/methods/hollow.py: METHOD: expected a Method, found nothing; "
        "a file in quantkit/methods/ must set METHOD"
    )


def test_attribute_of_wrong_type_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "formats", "odd", {"FORMAT": 3})
    with pytest.raises(QuantkitError, match="FORMAT: expected a Format, found a int"):
        registry.get_format("odd")


def test_missing_optional_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_import(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name="bitsandbytes.functional")

    monkeypatch.setattr(registry, "list_names", lambda kind: ("nf4",))
    monkeypatch.setattr(registry.importlib, "import_module", fail_import)
    with pytest.raises(
        UsageError, match="method 'nf4' needs the package 'bitsandbytes.functional'"
    ):
        registry.get_method("nf4")


def test_wrong_import_inside_quantkit_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_import(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'quantkit.nowhere'", name="quantkit.nowhere")

    monkeypatch.setattr(registry, "list_names", lambda kind: ("awq",))
    monkeypatch.setattr(registry.importlib, "import_module", fail_import)
    with pytest.raises(ModuleNotFoundError):
        registry.get_method("awq")


def test_listing_names_imports_no_plugin() -> None:
    """In a new interpreter, because other tests import plug-ins."""
    import subprocess

    program = (
        f"import sys; from quantkit import registry; kinds = {KINDS}; "
        "names = [(kind, name) for kind in kinds for name in registry.list_names(kind)]; "
        "plugins = {f'quantkit.{kind}.{name}' for kind, name in names}; "
        "print([m for m in sys.modules if m in plugins or m.startswith('torch')], len(plugins) > 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] True"
