"""Gates as JUnit XML, which CI systems show as tests: a bound is a test case, its file a suite per artifact. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree as Xml

from quantkit.artifact.fidelity_schema import Fidelity, GateResult
from quantkit.report import format_numbers


def format_junit(reports: Sequence[Fidelity]) -> bytes:
    """The file's bytes: a missed bound is a failure, one without a figure is skipped. Equal gates, equal bytes."""
    root = Xml.Element("testsuites", name="quantkit gates")
    for report in reports:
        suite = Xml.SubElement(root, "testsuite", name=_text(report.artifact.name))
        for key, value in _counts(report.gates).items():
            suite.set(key, value)
        for gate in report.gates:
            name = f"{gate.figure} {gate.bound}"
            case = Xml.SubElement(
                suite,
                "testcase",
                classname=f"quantkit.{_text(report.artifact.name)}",
                name=_text(name),
            )
            case.set("time", "0")
            told = f"{name}: found {format_numbers.format_digits(gate.value)}{f', {gate.reason}' if gate.reason else ''}"
            if gate.ok is False:
                Xml.SubElement(
                    case, "failure", type="gate missed", message=_text(told)
                ).text = _text(told)
            elif gate.ok is None:
                Xml.SubElement(case, "skipped", message=_text(gate.reason or "not judged"))
    for key, value in _counts([gate for report in reports for gate in report.gates]).items():
        if key != "skipped":
            root.set(key, value)
    Xml.indent(root, " ")
    return bytes(Xml.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _counts(gates: Sequence[GateResult]) -> dict[str, str]:
    missed, skipped = (
        sum(gate.ok is False for gate in gates),
        sum(gate.ok is None for gate in gates),
    )
    return {
        "tests": str(len(gates)),
        "failures": str(missed),
        "errors": "0",
        "skipped": str(skipped),
        "time": "0",
    }


def _text(text: str) -> str:
    """Without the control characters and half surrogate pairs that XML cannot hold."""
    return "".join(sign if sign.isprintable() else " " for sign in text)
