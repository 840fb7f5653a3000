"""The registry finds plug-ins by file name, and says what it did not find."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from quantkit import contracts, registry
from quantkit.errors import QuantkitError, UsageError

KINDS: tuple[registry.Kind, ...] = ("methods", "roundings", "formats", "architectures")


def planted(
    monkeypatch: pytest.MonkeyPatch, kind: registry.Kind, name: str, attributes: dict[str, object]
) -> None:
    """Pretend that quantkit/<kind>/<name>.py exists."""
    module = ModuleType(f"quantkit.{kind}.{name}")
    for key, value in attributes.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "list_names", lambda asked: (name,) if asked == kind else ())


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_the_files_of_the_folder(kind: registry.Kind) -> None:
    found = registry.list_names(kind)
    assert found == tuple(sorted(found))
    assert not any(name.startswith("_") for name in found)


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_loads(kind: registry.Kind) -> None:
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


def test_an_unknown_name_is_answered_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "list_names", lambda kind: ("gptq", "rtn"))
    with pytest.raises(UsageError) as caught:
        registry.get_method("gtpq")
    assert str(caught.value) == "no method named 'gtpq'. Did you mean 'gptq'? Known: gptq, rtn."
    with pytest.raises(UsageError) as caught:
        registry.get_format("zzz")
    assert str(caught.value) == "no format named 'zzz'. Known: gptq, rtn."


def test_a_module_without_its_attribute_fails_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, "methods", "hollow", {})
    with pytest.raises(QuantkitError) as caught:
        registry.get_method("hollow")
    assert str(caught.value) == (
        "quantkit/methods/hollow.py: METHOD: expected a Method, found nothing; "
        "a file in quantkit/methods/ must set METHOD"
    )


def test_an_attribute_of_the_wrong_kind_fails_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, "formats", "odd", {"FORMAT": 3})
    with pytest.raises(QuantkitError, match="FORMAT: expected a Format, found a int"):
        registry.get_format("odd")


def test_a_missing_optional_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name="bitsandbytes.functional")

    monkeypatch.setattr(registry, "list_names", lambda kind: ("nf4",))
    monkeypatch.setattr(registry.importlib, "import_module", absent)
    with pytest.raises(
        UsageError, match="method 'nf4' needs the package 'bitsandbytes.functional'"
    ):
        registry.get_method("nf4")


def test_a_mistake_in_our_own_imports_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'quantkit.nowhere'", name="quantkit.nowhere")

    monkeypatch.setattr(registry, "list_names", lambda kind: ("awq",))
    monkeypatch.setattr(registry.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError):
        registry.get_method("awq")


def test_looking_up_names_imports_no_plugin() -> None:
    """In a fresh interpreter, because other tests import plug-ins."""
    import subprocess

    program = (
        f"import sys; from quantkit import registry; kinds = {KINDS}; "
        "plugins = {f'quantkit.{kind}.{name}' for kind in kinds for name in registry.names(kind)}; "
        "print([m for m in sys.modules if m in plugins or m.startswith('torch')], len(plugins) > 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] True"
