"""Gates as JUnit XML for CI systems: a test case per bound, a suite per artifact. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree as Xml

from quantkit.artifact.fidelity_schema import Fidelity, GateResult
from quantkit.report import format_numbers


def format_junit(reports: Sequence[Fidelity]) -> bytes:
    """Return the XML file: a missed bound is a failure, a bound without a figure is skipped, and
    one that is kept and not proven says so in its output.

    The same gates give the same bytes.
    """
    root = Xml.Element("testsuites", name="quantkit gates")
    for report in reports:
        suite = Xml.SubElement(root, "testsuite", name=_replace_invalid(report.artifact.name))
        for key, value in _counts(report.gates).items():
            suite.set(key, value)
        for gate in report.gates:
            name = f"{gate.figure} {gate.bound}"
            case = Xml.SubElement(
                suite,
                "testcase",
                classname=f"quantkit.{_replace_invalid(report.artifact.name)}",
                name=_replace_invalid(name),
            )
            case.set("time", "0")
            reason = f", {gate.reason}" if gate.reason else ""
            message = f"{name}: found {format_numbers.format_digits(gate.value)}{reason}"
            if gate.ok is False:
                Xml.SubElement(
                    case, "failure", type="gate failed", message=_replace_invalid(message)
                ).text = _replace_invalid(message)
            elif gate.ok is None:
                Xml.SubElement(
                    case, "skipped", message=_replace_invalid(gate.reason or "not judged")
                )
            elif gate.is_unproven:
                Xml.SubElement(case, "system-out").text = _replace_invalid(
                    f"{message}, {gate.outcome}: its interval crosses the bound"
                )
    for key, value in _counts([gate for report in reports for gate in report.gates]).items():
        if key != "skipped":
            root.set(key, value)
    Xml.indent(root, " ")
    return bytes(Xml.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _counts(gates: Sequence[GateResult]) -> dict[str, str]:
    failed = sum(gate.ok is False for gate in gates)
    skipped = sum(gate.ok is None for gate in gates)
    return {
        "tests": str(len(gates)),
        "failures": str(failed),
        "errors": "0",
        "skipped": str(skipped),
        "time": "0",
    }


def _replace_invalid(text: str) -> str:
    """Replace control characters and lone surrogates, which XML does not allow."""
    return "".join(character if character.isprintable() else " " for character in text)
