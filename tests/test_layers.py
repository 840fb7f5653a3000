"""The shape of the code, kept by a machine: who may import whom, who may touch files, how long things may grow."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "quantkit"

ROWS = (
    "__init__ errors progress",
    "contracts gateway/",
    "numerics/ storage/",
    "packing/ families/",
    "methods/ formats/ architectures/",
    "registry",
    "models/",
    "planning/",
    "checks/",
    "handover/",
    "report/",
    "building/ deep/ sizing/ pricing/ loadtest/",
    "loading",
    "serving/ evaluate/",
    "diff/ evidence",
    "manifests",
    "resume",
    "pipeline",
    "console options",
    "commands/",
    "cli",
    "__main__",
)
"""From the words everybody may use down to the program: a file imports only from rows above its own."""

INSIDE: Mapping[str, tuple[str, ...]] = {
    "families/": ("anatomy", "mixture"),
    "models/": ("fold layers", "structure whole", "proofs", "generic"),
    "packing/": ("packed engine_names stored", "gptq_tensors"),
    "planning/": (
        "document rules", "rewrite claims faults", "schema", "recipe decide published", "memory outputs", "plan",
        "sources",
    ),
    "building/": ("artifact streams", "experts solve", "work", "dense", "routed standing", "halfway", "build"),
    "handover/": ("verify", "transfer signing", "publishing pulling"),
}  # fmt: skip
"""Folders with rows of their own."""

TOOLS = ("builtin_models/", "calibration_sets/")
"""Developer tools: they made the data that ships. They may use everything, nothing of quantkit uses them."""

SIBLINGS = (
    "numerics/", "storage/", "checks/", "report/", "evaluate/", "diff/", "deep/", "sizing/", "pricing/", "gateway/",
    "serving/", "loadtest/", *TOOLS,
)  # fmt: skip
"""Folders whose files may import each other; plug-ins do not know one another."""

MAY_TOUCH_FILES: Mapping[str, frozenset[str]] = {
    "building/artifact.py": frozenset({
        "read_bytes",
        "rename",
        "unlink",
    }),  # the staging folder and its renaming
    "options.py": frozenset({"read_text"}),  # the recipe
    "planning/published.py": frozenset({"read_text"}),  # configs, package data
    "sizing/cards.py": frozenset({"read_text"}),  # the cards, package data
    "pricing/assumptions.py": frozenset({"read_bytes", "read_text"}),  # a user file; the defaults, package data
    "handover/signing.py": frozenset({"read_bytes"}),  # a signature, by storage's own
    "pipeline.py": frozenset({"mkdir"}),  # samples/
    "resume.py": frozenset({"mkdir", "rmtree", "unlink"}),  # the scratch folder, and what an interrupted build left
    "evaluate/results.py": frozenset({"mkdir"}),  # the folder of an evaluation
    "evaluate/distribution.py": frozenset({"write_table"}),  # pyarrow writes its own files
    "evaluate/likelihood.py": frozenset({"write_table"}),  # the same
    "evaluate/samples.py": frozenset({"write_table", "os.replace", "unlink", "mkdir"}),  # and its cache
    "evaluate/backends.py": frozenset({"from_pretrained"}),  # transformers reads its own files
    "evaluate/endpoint.py": frozenset({"openai", "urllib.parse"}),  # the official client of an API; no file
    "evaluate/jail.py": frozenset({"os.open"}),  # /dev/null, inside the jail
    "evaluate/sandbox.py": frozenset({"socket"}),  # a connected pair between two jails
    "evaluate/watch.py": frozenset({"read_text"}),  # what /proc says of a jail
    "gateway/relay.py": frozenset({"httpx2"}),  # what becomes of its connections
    "gateway/upstreams.py": frozenset({"httpx2"}),  # to the engines; no file
    "loadtest/engine.py": frozenset({"httpx2"}),  # what a server tells of itself
    "loadtest/prompts.py": frozenset({"read_bytes"}),  # a data set, as storage reads files
    "loadtest/tool.py": frozenset({"open", "read_text", "unlink"}),  # another program's log and results
    "serving/running.py": frozenset({"httpx2", "socket"}),  # is the port free, is the engine there yet
    "serving/start.py": frozenset({"read_bytes"}),  # a chat template, as storage reads files
}
"""Outside storage/: exactly these. Whoever adds a line here says why."""

FILE_CALLS = {
    "open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "unlink", "rename", "rmtree", "touch",
    "symlink_to", "rmdir", "write_table", "from_pretrained", "os.open", "os.replace", "os.remove", "os.makedirs",
    "shutil.copy", "shutil.move",
}  # fmt: skip
NETWORK = {
    "requests", "httpx", "httpx2", "urllib", "socket", "http", "ftplib", "aiohttp", "huggingface_hub", "openai",
}  # fmt: skip
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 350

Tree = Mapping[str, ast.Module]  # path relative to the package -> its syntax
Check = Callable[[Tree], list[str]]


@cache
def parsed() -> Tree:
    """Every file of the package."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def unit(file: str) -> str:
    """What a row names: a folder with its slash, or a file without ".py"."""
    folder, slash, _ = file.partition("/")
    return folder + slash if slash else file.removesuffix(".py")


def heights() -> Mapping[str, tuple[int, int]]:
    """The row of every unit, and of files in folders with rows of their own; tools are below everything."""
    height = {name: (row, 0) for row, names in enumerate(ROWS) for name in names.split()}
    height |= {tool: (len(ROWS), 0) for tool in TOOLS}
    for folder, rows in INSIDE.items():
        row = height[folder][0]
        height |= {f"{folder}{name}.py": (row, inner) for inner, names in enumerate(rows) for name in names.split()}
    return height


def imported(file: str, tree: Tree) -> Iterator[str]:
    """The files of the package that a file imports, wherever the import stands."""
    for node in ast.walk(tree[file]):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.partition(".")[0] == "quantkit":
                yield existing(name.split(".")[1:], tree)


def existing(parts: list[str], tree: Tree) -> str:
    """The file that holds quantkit.<parts>, a module or a name in one."""
    whole = "/".join(parts)
    for path in (whole, "/".join(parts[:-1])):
        for file in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
            if file in tree:
                return file
    return whole


# -------------------------------------------------------------------------------------------------------- the checks


def upward_imports(tree: Tree) -> list[str]:
    """Imports that do not point to a row above, and files that no row names."""
    height = heights()
    found = [f"{file}: in no row of ROWS" for file in tree if row_of(file, height) is None]
    for file in tree:
        for target in imported(file, tree):
            here, there = unit(file), unit(target)
            siblings = here == there and here in SIBLINGS
            tools = here in TOOLS and there in TOOLS
            own_package = target == f"{there}__init__.py" and here == there
            if target not in tree:
                found.append(f"{file}: imports {target}, which is no file; write absolute imports")
            elif not (siblings or tools or own_package):
                above, below = row_of(target, height), row_of(file, height)
                if above is None or below is None or above >= below:
                    found.append(f"{file}: imports {target}, which is not above it")
    return found


def row_of(file: str, height: Mapping[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Where a file stands; from outside its folder all of a folder stands in one row."""
    if unit(file) in INSIDE and not file.endswith("/__init__.py"):
        return height.get(file)
    return height.get(unit(file))


def import_cycles(tree: Tree) -> list[str]:
    """Files that import each other in a circle, siblings included."""
    graph = {file: {target for target in imported(file, tree) if target != file} for file in tree}
    while leaves := [file for file, targets in graph.items() if not targets & set(graph)]:
        for file in leaves:
            del graph[file]
    return [f"{file}: on or above a circle of imports" for file in graph]


def file_access(tree: Tree) -> list[str]:
    """Files and sockets outside storage/ and the listed exceptions; exceptions that nobody needs any more."""
    found = []
    for file, module in tree.items():
        if unit(file) in ("storage/", *TOOLS):
            continue
        used = {name for node in ast.walk(module) if (name := touches(node))}
        allowed = MAY_TOUCH_FILES.get(file, frozenset())
        found += [f"{file}: {name}" for name in sorted(used - allowed)]
        found += [f"{file}: {name} is allowed and not used" for name in sorted(allowed - used)]
    return found


def touches(node: ast.AST) -> str | None:
    """What a node does with files or sockets; None when it does nothing."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        return next((name for name in names if name.partition(".")[0] in NETWORK), None)
    if not isinstance(node, ast.Call):
        return None
    whole = ast.unparse(node.func)
    last = whole.rpartition(".")[2]
    if whole in {"Checkpoint.open", "Ledger.open", "Spool.open"}:  # storage's own readers
        return None
    return whole if whole in FILE_CALLS else last if last in FILE_CALLS else None


def talking(tree: Tree) -> list[str]:
    """Printing, exiting and click outside the command line."""
    loud = {"print", "input", "click.echo", "click.secho", "sys.exit", "exit", "quit"}
    found = []
    for file, module in tree.items():
        if unit(file) in {"cli", "console", "options", "commands/"} or unit(file) in TOOLS:
            continue
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in loud:
                found.append(f"{file}:{node.lineno}: {ast.unparse(node.func)}")
            elif isinstance(node, ast.Import) and any(alias.name == "click" for alias in node.names):
                found.append(f"{file}:{node.lineno}: imports click")
    return found


def changing_globals(tree: Tree) -> list[str]:
    """`global` statements."""
    return [
        f"{file}:{node.lineno}: global"
        for file, module in tree.items()
        for node in ast.walk(module)
        if isinstance(node, ast.Global)
    ]


def relayed_keywords(tree: Tree) -> list[str]:
    """`**kwargs` in a signature, but for a decorator typed by a ParamSpec and for what stands in for any function."""
    return [
        f"{file}:{node.lineno}: {node.name}(**{node.args.kwarg.arg})"
        for file, node in functions(tree)
        if node.args.kwarg
        and node.name != "__call__"
        and not (isinstance(node.args.kwarg.annotation, ast.Attribute) and node.args.kwarg.annotation.attr == "kwargs")
    ]


def functions(tree: Tree) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function and method, with its file."""
    for file, module in tree.items():
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield file, node


def too_long(tree: Tree) -> list[str]:
    """Functions of more than 60 lines, files of more than 350."""
    found = [
        f"{file}: {node.name} has {lines} lines"
        for file, node in functions(tree)
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    ends = {file: max((node.end_lineno or 0 for node in module.body), default=0) for file, module in tree.items()}
    return found + [f"{file}: {lines} lines" for file, lines in ends.items() if lines > MAX_FILE_LINES]


def chosen_devices(tree: Tree) -> list[str]:
    """numerics/ deciding where to compute: that is the caller's choice."""
    found = []
    for file, module in tree.items():
        for node in ast.walk(module) if unit(file) == "numerics/" else ():
            moved = isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".cuda", ".cpu"))
            asked = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda"
            named = isinstance(node, ast.keyword) and node.arg == "device" and isinstance(node.value, ast.Constant)
            if moved or asked or (named and node.value.value is not None):
                found.append(f"{file}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)}")
    return found


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        upward_imports, import_cycles, file_access, talking, changing_globals, relayed_keywords, too_long,
        chosen_devices,
    )
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_the_code_keeps_its_shape(check: Check) -> None:
    assert check(parsed()) == []


def test_every_row_names_what_is_there() -> None:
    there = {unit(file) for file in parsed()}
    assert {name for names in ROWS for name in names.split()} | set(TOOLS) == there
    for folder, rows in INSIDE.items():
        inside = {file for file in parsed() if unit(file) == folder and not file.endswith("/__init__.py")}
        assert {f"{folder}{name}.py" for names in rows for name in names.split()} == inside


PLANTED = [
    ("upward_imports", "numerics/gram.py", "from quantkit.planning.plan import Plan", "imports planning/plan.py"),
    ("upward_imports", "storage/files.py", "def f():\n    from quantkit.planning import schema", "imports planning/"),
    ("upward_imports", "methods/awq.py", "from quantkit.methods import rtn", "imports methods/rtn.py, which is not"),
    ("upward_imports", "planning/plan.py", "from quantkit.report.summary import totals", "imports report/summary.py"),
    ("upward_imports", "planning/plan.py", "from . import errors", "imports ., which is no file"),
    ("upward_imports", "helpers.py", "", "in no row of ROWS"),
    ("upward_imports", "cli.py", "import quantkit.calibration_sets", "imports calibration_sets/__init__.py, which"),
    ("import_cycles", "numerics/affine.py", "from quantkit.numerics import clip", "numerics/clip.py: on or above a"),
    ("file_access", "planning/plan.py", "import pathlib\npathlib.Path('x').write_text('y')", "planning/plan.py: write"),
    ("file_access", "planning/recipe.py", "with open('x') as file: pass", "planning/recipe.py: open"),
    ("file_access", "planning/decide.py", "p.open('rb')", "planning/decide.py: open"),
    ("file_access", "pipeline.py", "import huggingface_hub.utils", "pipeline.py: huggingface_hub.utils"),
    ("file_access", "evaluate/tasks.py", "from urllib.request import urlopen", "evaluate/tasks.py: urllib.request"),
    ("file_access", "building/artifact.py", None, "building/artifact.py: rename is allowed and not used"),
    ("talking", "building/build.py", "print('done')", "building/build.py:1: print"),
    ("talking", "pipeline.py", "import sys\nsys.exit(1)", "pipeline.py:2: sys.exit"),
    ("talking", "report/terminal.py", "import click", "report/terminal.py:1: imports click"),
    ("changing_globals", "building/work.py", "def f():\n    global x\n    x = 1", "building/work.py:2: global"),
    ("relayed_keywords", "building/build.py", "def f(**kwargs: object): ...", "building/build.py:1: f(**kwargs)"),
    ("too_long", "models/fold.py", "def f():\n" + "    x = 1\n" * 60, "models/fold.py: f has 61 lines"),
    ("too_long", "models/fold.py", "x = 1\n" * 351, "models/fold.py: 351 lines"),
    ("chosen_devices", "numerics/gram.py", "x = torch.cuda.device_count()", "numerics/gram.py:1: torch.cuda"),
    ("chosen_devices", "numerics/gram.py", "y = x.cpu()", "numerics/gram.py:1: x.cpu()"),
    ("chosen_devices", "numerics/gram.py", "y = zeros(3, device='cuda')", "numerics/gram.py:1: device='cuda'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "text", "expected"), PLANTED)
def test_a_planted_violation_is_found(name: str, file: str, text: str | None, expected: str) -> None:
    """The real package with one file changed: each check can fail."""
    changed = {**parsed(), file: ast.parse(text or "")}
    assert any(expected in fault for fault in CHECKS[name](changed))
