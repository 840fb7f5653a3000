"""The structure of the code: imports, file access and lengths, checked on the syntax of
every file.
"""

from __future__ import annotations

import ast
import gc
from collections.abc import Callable, Iterator, Mapping
from functools import cache

import pytest
from support.paths import ROOT

PACKAGE = ROOT / "quantkit"

ROWS = (
    "version library_settings errors progress figure_readers dtypes",
    "contracts figures",
    "numerics/ io/",
    "methods/ roundings/ formats/ architectures/",
    "registry",
    "checkpoint/",
    "models/ texts/",
    "recipe/",
    "plan/",
    "artifact/",
    "verify/",
    "build/ publish/",
    "evaluate/",
    "report/",
    "pipeline doctor progress_bars diff/ serve/ tracking/",
    "api",
    "cli/",
    "__init__ __main__",
)
"""A file imports only from rows above its own."""

PLUGINS = ("methods/", "roundings/", "formats/", "architectures/")
"""Plug-ins do not import each other. They share the subpackages of their folder."""

FILE_PACKAGES = ("io/", "checkpoint/", "texts/", "publish/")
"""Packages whose purpose is to read and write files or to use the network."""

MAY_TOUCH_FILES: Mapping[str, frozenset[str]] = {
    "artifact/front_matter.py": frozenset({"read_text"}),  # the source's model card
    "build/spool.py": frozenset({"unlink"}),  # hidden states on disk
    "evaluate/answer_store.py": frozenset({"mkdir"}),  # the folder of its SQLite file
    "artifact/staging.py": frozenset({"rename", "unlink"}),  # the staging folder and its renaming
    "artifact/replace.py": frozenset({"rmdir", "unlink"}),  # the files of a replaced artifact
    "recipe/recipe_file.py": frozenset({"read_text"}),  # the recipe
    "plan/published.py": frozenset({"read_text"}),  # configs, package data
    "serve/sizing/gpus.py": frozenset({"read_text"}),  # the cards, package data
    "serve/cost/assumptions.py": frozenset({
        "read_bytes",
        "read_text",
    }),  # a user file; the defaults, package data
    "publish/sign.py": frozenset({"read_bytes"}),  # a signature, by storage's own
    "pipeline.py": frozenset({"mkdir"}),  # samples/
    "build/session.py": frozenset({
        "mkdir",
        "rmtree",
        "unlink",
    }),  # the scratch folder of an interrupted build
    "evaluate/results.py": frozenset({"mkdir"}),  # the folder of an evaluation
    "evaluate/token_samples.py": frozenset({"write_table"}),  # pyarrow writes its own files
    "evaluate/solution_likelihood.py": frozenset({"write_table"}),  # the same
    "evaluate/item_results.py": frozenset({"write_table", "mkdir"}),  # to memory; its cache
    "verify/engines/transformers_load.py": frozenset({"from_pretrained"}),  # of a state, no file
    "evaluate/backends.py": frozenset({"from_pretrained"}),  # transformers reads its own files
    "doctor.py": frozenset({"huggingface_hub"}),  # whether a token is stored; no request
    "evaluate/endpoint_text.py": frozenset({"openai"}),  # types of the official client
    "evaluate/openai_backend.py": frozenset({"openai"}),  # types of the official client
    "evaluate/openai_client.py": frozenset({"openai"}),  # the official client of an API; no file
    "evaluate/sandbox/cgroup.py": frozenset({
        "mkdir",
        "read_text",
        "rmdir",
        "write_text",
    }),  # the kernel's files of a group
    "evaluate/sandbox/runner.py": frozenset({"os.open"}),  # /dev/null, inside the jail
    "evaluate/sandbox/jail.py": frozenset({"socket"}),  # a connected pair between two jails
    "evaluate/sandbox/limits.py": frozenset({"read_text"}),  # what /proc says of a jail
    "serve/canary.py": frozenset({"httpx2"}),  # requests to the engine, bounded
    "serve/gateway/access.py": frozenset({"urllib.parse"}),  # names in headers; no request
    "serve/gateway/relay.py": frozenset({"httpx2"}),  # what becomes of its connections
    "serve/gateway/upstreams.py": frozenset({"httpx2"}),  # to the engines; no file
    "serve/loadtest/engine.py": frozenset({"httpx2"}),  # a server's metrics
    "serve/loadtest/slo_file.py": frozenset({"read_text"}),  # the defaults, package data
    "serve/loadtest/prompts.py": frozenset({"read_bytes"}),  # a data set, as storage reads files
    "serve/loadtest/guidellm.py": frozenset({
        "open",
        "read_bytes",
        "read_text",
        "unlink",
    }),  # another program's log and results
    "serve/engines/engine_process.py": frozenset({
        "httpx2",
        "socket",
    }),  # is the port free, is the engine there yet
    "serve/engines/start.py": frozenset({
        "mkdir",
        "read_bytes",
    }),  # the folder of monitoring files; a chat template and a manifest, as storage reads files
}
"""File and network access outside FILE_PACKAGES, with the reason for each."""

FILE_CALLS = {
    "open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "unlink", "rename",
    "rmtree", "touch", "symlink_to", "rmdir", "write_table", "from_pretrained", "os.open",
    "os.replace", "os.remove", "os.makedirs", "shutil.copy", "shutil.move",
}  # fmt: skip
OWN_READERS = {"Checkpoint.open", "Journal.open", "Ledger.open", "Spool.open"}
NETWORK = {
    "requests", "httpx", "httpx2", "urllib", "socket", "http", "ftplib", "aiohttp",
    "huggingface_hub", "openai",
}  # fmt: skip
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500

Tree = Mapping[str, ast.Module]  # path relative to the package -> its syntax tree
Check = Callable[[Tree], list[str]]


def parse_source(text: str) -> ast.Module:
    """Parse Python source while no finalizer can run.

    CPython 3.11 counts the depth of `ast.parse` once per interpreter. If the garbage collector runs
    in the middle of it and finalizes an object that another test leaked, the finalizer may call
    `ast.parse` as well: every traceback that Python 3.11 formats does. The outer call then raises
    SystemError, "AST constructor recursion depth mismatch".
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        if was_enabled:
            gc.enable()


@cache
def parse_package() -> Tree:
    """Parse every file of the package."""
    return {
        path.relative_to(PACKAGE).as_posix(): parse_source(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@cache
def walk_nodes(module: ast.Module) -> tuple[ast.AST, ...]:
    """Return the nodes of a module's syntax tree; each check visits all of them."""
    return tuple(ast.walk(module))


def unit_of(file: str) -> str:
    """Return the name that a row uses for a file: its top folder with a slash, or its stem."""
    folder, slash, _ = file.partition("/")
    return folder + slash if slash else file.removesuffix(".py")


def row_numbers() -> Mapping[str, int]:
    """Map every unit to the number of its row."""
    return {name: row for row, names in enumerate(ROWS) for name in names.split()}


def imported_files(file: str, tree: Tree) -> Iterator[str]:
    """Yield the files of the package that a file imports, at module level or in functions."""
    for node in walk_nodes(tree[file]):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.partition(".")[0] == "quantkit":
                yield resolve_file(name.split(".")[1:], tree)


def resolve_file(parts: list[str], tree: Tree) -> str:
    """Return the file that defines quantkit.<parts>, a module or a name in a module."""
    whole = "/".join(parts)
    for path in (whole, "/".join(parts[:-1])):
        for file in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
            if file in tree:
                return file
    return whole


def is_plugin(file: str) -> bool:
    """Whether a file is a plug-in: directly in a plug-in folder."""
    return unit_of(file) in PLUGINS and file.count("/") == 1 and not file.endswith("/__init__.py")


# ----------------------------------------------------------------------------------------- checks


def upward_imports(tree: Tree) -> list[str]:
    """Imports that do not point to a row above, and files that no row names."""
    rows = row_numbers()
    faults = [f"{file}: in no row of ROWS" for file in tree if unit_of(file) not in rows]
    for file in tree:
        for target in imported_files(file, tree):
            here, there = unit_of(file), unit_of(target)
            if target not in tree:
                faults.append(f"{file}: imports {target}, which is no file; write absolute imports")
            elif here == there:
                if is_plugin(target):
                    faults.append(f"{file}: imports {target}, which is a plug-in")
            elif rows.get(there, len(rows)) >= rows.get(here, -1):
                faults.append(f"{file}: imports {target}, which is not above it")
    return faults


def import_cycles(tree: Tree) -> list[str]:
    """Files that import each other in a cycle, or import such a file."""
    graph = {file: {t for t in imported_files(file, tree) if t != file} for file in tree}
    while leaves := [file for file, targets in graph.items() if not targets & set(graph)]:
        for file in leaves:
            del graph[file]
    return [f"{file}: on or above a cycle of imports" for file in graph]


def file_access(tree: Tree) -> list[str]:
    """File and network access that is not listed, and listed access that is not used."""
    faults = []
    for file, module in tree.items():
        if unit_of(file) in FILE_PACKAGES:
            continue
        used = {name for node in walk_nodes(module) if (name := accessed_resource(node))}
        allowed = MAY_TOUCH_FILES.get(file, frozenset())
        faults += [f"{file}: {name}" for name in sorted(used - allowed)]
        faults += [f"{file}: {name} is allowed and not used" for name in sorted(allowed - used)]
    return faults + [f"{file}: listed and no file" for file in MAY_TOUCH_FILES if file not in tree]


def accessed_resource(node: ast.AST) -> str | None:
    """Return the call or module by which a node uses files or the network, or None."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        is_import = isinstance(node, ast.Import)
        names = [alias.name for alias in node.names] if is_import else [node.module or ""]
        return next((name for name in names if name.partition(".")[0] in NETWORK), None)
    if not isinstance(node, ast.Call):
        return None
    whole = ast.unparse(node.func)
    last = whole.rpartition(".")[2]
    if whole in OWN_READERS:
        return None
    return whole if whole in FILE_CALLS else last if last in FILE_CALLS else None


def console_output(tree: Tree) -> list[str]:
    """Printing, exiting and click outside cli/."""
    calls = {"print", "input", "click.echo", "click.secho", "sys.exit", "exit", "quit"}
    faults = []
    for file, module in tree.items():
        if unit_of(file) == "cli/":
            continue
        for node in walk_nodes(module):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                faults.append(f"{file}:{node.lineno}: {ast.unparse(node.func)}")
            elif isinstance(node, ast.Import) and any(a.name == "click" for a in node.names):
                faults.append(f"{file}:{node.lineno}: imports click")
    return faults


def global_statements(tree: Tree) -> list[str]:
    """`global` statements."""
    return [
        f"{file}:{node.lineno}: global"
        for file, module in tree.items()
        for node in walk_nodes(module)
        if isinstance(node, ast.Global)
    ]


def relayed_keywords(tree: Tree) -> list[str]:
    """`**kwargs` in a signature, except in a ParamSpec decorator and in `__call__`."""
    return [
        f"{file}:{node.lineno}: {node.name}(**{node.args.kwarg.arg})"
        for file, node in iterate_functions(tree)
        if node.args.kwarg
        and node.name != "__call__"
        and not (
            isinstance(node.args.kwarg.annotation, ast.Attribute)
            and node.args.kwarg.annotation.attr == "kwargs"
        )
    ]


def iterate_functions(tree: Tree) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield every function and method with its file."""
    for file, module in tree.items():
        for node in walk_nodes(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield file, node


def excessive_length(tree: Tree) -> list[str]:
    """Functions of more than MAX_FUNCTION_LINES, files of more than MAX_FILE_LINES."""
    faults = [
        f"{file}: {node.name} has {lines} lines"
        for file, node in iterate_functions(tree)
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    ends = {
        file: max((node.end_lineno or 0 for node in module.body), default=0)
        for file, module in tree.items()
    }
    return faults + [f"{file}: {n} lines" for file, n in ends.items() if n > MAX_FILE_LINES]


def device_choices(tree: Tree) -> list[str]:
    """Choices of a device in numerics/: the caller chooses."""
    faults = []
    for file, module in tree.items():
        for node in walk_nodes(module) if unit_of(file) == "numerics/" else ():
            moved = isinstance(node, ast.Call) and ast.unparse(node.func).endswith((
                ".cuda",
                ".cpu",
            ))
            queried = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda"
            literal = (
                isinstance(node, ast.keyword)
                and node.arg == "device"
                and isinstance(node.value, ast.Constant)
                and node.value.value is not None
            )
            if moved or queried or literal:
                faults.append(f"{file}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)}")
    return faults


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        upward_imports,
        import_cycles,
        file_access,
        console_output,
        global_statements,
        relayed_keywords,
        excessive_length,
        device_choices,
    )
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_package_passes_check(check: Check) -> None:
    assert check(parse_package()) == []


def test_every_row_names_an_existing_unit() -> None:
    assert {name for names in ROWS for name in names.split()} == set(map(unit_of, parse_package()))


PLANTED = [
    (
        "upward_imports",
        "numerics/gram.py",
        "from quantkit.plan.plan import Plan",
        "imports plan/plan.py",
    ),
    (
        "upward_imports",
        "io/files.py",
        "def f():\n    from quantkit.recipe import schema",
        "imports recipe/",
    ),
    (
        "upward_imports",
        "methods/awq.py",
        "from quantkit.methods import rtn",
        "imports methods/rtn.py, which is",
    ),
    (
        "upward_imports",
        "roundings/gptq_once.py",
        "from quantkit.roundings import gptq",
        "imports roundings/gptq.py, which",
    ),
    (
        "upward_imports",
        "roundings/gptq.py",
        "from quantkit.methods import gptq",
        "imports methods/gptq.py, which is not above",
    ),
    (
        "upward_imports",
        "formats/common/checks.py",
        "from quantkit.formats import awq",
        "which is a plug-in",
    ),
    (
        "upward_imports",
        "plan/plan.py",
        "from quantkit.report.tables import Table",
        "imports report/tables.py",
    ),
    ("upward_imports", "plan/plan.py", "from . import errors", "imports ., which is no file"),
    ("upward_imports", "helpers.py", "", "in no row of ROWS"),
    (
        "import_cycles",
        "numerics/affine.py",
        "from quantkit.numerics import range_search",
        "numerics/range_search.py",
    ),
    (
        "file_access",
        "plan/plan.py",
        "import pathlib\npathlib.Path('x').write_text('y')",
        "plan/plan.py: write",
    ),
    ("file_access", "recipe/parse.py", "with open('x') as file: pass", "recipe/parse.py: open"),
    ("file_access", "plan/decisions.py", "p.open('rb')", "plan/decisions.py: open"),
    (
        "file_access",
        "pipeline.py",
        "import huggingface_hub.utils",
        "pipeline.py: huggingface_hub.utils",
    ),
    (
        "file_access",
        "evaluate/tasks.py",
        "from urllib.request import urlopen",
        "evaluate/tasks.py: urllib.request",
    ),
    (
        "file_access",
        "artifact/staging.py",
        "",
        "artifact/staging.py: rename is allowed and not used",
    ),
    ("console_output", "build/loop.py", "print('done')", "build/loop.py:1: print"),
    ("console_output", "pipeline.py", "import sys\nsys.exit(1)", "pipeline.py:2: sys.exit"),
    ("console_output", "report/terminal.py", "import click", "report/terminal.py:1: imports click"),
    (
        "global_statements",
        "build/context.py",
        "def f():\n    global x\n    x = 1",
        "build/context.py:2: global",
    ),
    (
        "relayed_keywords",
        "build/loop.py",
        "def f(**kwargs: object): ...",
        "build/loop.py:1: f(**kwargs)",
    ),
    (
        "excessive_length",
        "models/scaling.py",
        "def f():\n" + "    x = 1\n" * 60,
        "models/scaling.py: f has 61 lines",
    ),
    ("excessive_length", "models/scaling.py", "x = 1\n" * 501, "models/scaling.py: 501 lines"),
    (
        "device_choices",
        "numerics/gram.py",
        "x = torch.cuda.device_count()",
        "numerics/gram.py:1: torch.cuda",
    ),
    ("device_choices", "numerics/gram.py", "y = x.cpu()", "numerics/gram.py:1: x.cpu()"),
    (
        "device_choices",
        "numerics/gram.py",
        "y = zeros(3, device='cuda')",
        "numerics/gram.py:1: device='cuda'",
    ),
]


@pytest.mark.parametrize(("name", "file", "text", "expected"), PLANTED)
def test_check_reports_planted_violation(name: str, file: str, text: str, expected: str) -> None:
    """Change one file of the real package: each check can fail."""
    changed = {**parse_package(), file: parse_source(text)}
    assert any(expected in fault for fault in CHECKS[name](changed))


class ParsingFinalizer:
    """Garbage in a cycle whose finalizer parses, as the formatting of a traceback does."""

    def __init__(self) -> None:
        self.cycle = self

    def __del__(self) -> None:
        ast.parse("(a + b)")


def test_parsing_does_not_depend_on_the_garbage_of_other_tests() -> None:
    """With `ast.parse` in place of `parse_source` most of the 20 calls fail in CPython 3.11."""
    text = "\n".join(f"def f{n}(a, b):\n    return [a + {n}, (b, a[{n}])]" for n in range(300))
    for _ in range(20):
        for _ in range(3):
            ParsingFinalizer()
        assert len(parse_source(text).body) == 300
    gc.collect()  # or pytest's own parsing would meet the garbage
