"""The house rules a reader relies on: which room may import which, what the native core may include, how long a file may be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES_AT_MOST = 500

# Room -> rooms it may import. `errors` and `_version` are open to all; a room may always import itself. Imports under
# TYPE_CHECKING do not count: they load nothing.
BELOW_API = {"patches", "ops", "models", "runtime", "editors", "evaluation", "data"}
ALLOWED = {
    "errors": set(),
    "_version": set(),
    "patches": {"ops"},
    "ops": set(),
    "models": {"patches", "ops"},
    "runtime": {"models", "patches", "ops"},
    "data": {"patches"},
    "editors": {"patches", "models", "ops", "data", "zoo"},
    "evaluation": {"patches", "models", "runtime", "ops", "data", "api", "xpatch"},
    "zoo": {"data", "patches", "evaluation"},
    "api": BELOW_API,
    "store": {"patches", "evaluation", "api", "watch"},
    "watch": {"models", "patches", "ops", "runtime", "evaluation", "api"},
    "xpatch": {*BELOW_API, "api"},
    "upgrade": {*BELOW_API, "api"},
    "exporters": {"patches", "models", "ops", "runtime"},
    # Only public names.
    "benchmarks": {"xpatch", "zoo", "data", "evaluation", "exporters", "ops", "patches"},
    "doctor": {*BELOW_API, "api", "xpatch", "zoo"},
    "demo": {"xpatch", "zoo", "data", "evaluation", "exporters", "benchmarks", "editors", "patches"},
    "serve": {*BELOW_API, "api", "xpatch", "zoo"},
    "__main__": {"cli"},
    "cli": {*BELOW_API, "api", "store", "watch", "xpatch", "zoo", "doctor", "demo", "serve", "exporters", "benchmarks"},
}

# Doors: a method of a value that only hands on to a room above it, imported when it is called. (module, room behind the door).
DOORS = {("xpatch.patches.types", "watch")}  # PatchSet.check


def python_files() -> list[tuple[Path, str]]:
    """Every packaged file with its dotted module name."""
    found = []
    for folder, prefix in (
        ("xpatch", "xpatch"),
        ("exporters", "xpatch.exporters"),
        ("benchmarks", "xpatch.benchmarks"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found.append((path, ".".join([prefix, *(part for part in parts if part != "__init__")])))
    return found


def room_of(module: str) -> str:
    """``xpatch.ops.native`` -> ``ops``; ``xpatch`` itself -> ``xpatch``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes_that_run(tree: ast.AST):
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            for other in node.orelse:
                yield other
                yield from nodes_that_run(other)
            continue
        yield node
        yield from nodes_that_run(node)


def imports(path: Path, module: str) -> set[str]:
    """Rooms of xpatch that this file imports, wherever in the file it does."""
    rooms = {path.name for path in (ROOT / "xpatch").iterdir()} | {f"{room}.py" for room in ALLOWED} | set(ALLOWED)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in nodes_that_run(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [base])])
            names = (
                [f"xpatch.{a.name}" if f"{a.name}" in rooms else base for a in node.names]
                if base == "xpatch"
                else [base]
            )
        else:
            continue
        found |= {room_of(name) for name in names if name == "xpatch" or name.startswith("xpatch.")}
    return found


@pytest.mark.parametrize(("path", "module"), [pytest.param(*found, id=found[1]) for found in python_files()])
def test_arrows_point_one_way(path, module):
    room = room_of(module)
    assert room in ALLOWED, f"{module}: no rule for the room {room!r}; add one that fits the architecture"
    doors = {behind for where, behind in DOORS if where == module}
    forbidden = imports(path, module) - ALLOWED[room] - doors - {room, "errors", "_version", "_native"}
    assert not forbidden, f"{module} imports {sorted(forbidden)}; {room} may import {sorted(ALLOWED[room])}"


def test_only_ops_know_the_native_module():
    users = [module for path, module in python_files() if "_native" in imports(path, module)]
    assert [user for user in users if room_of(user) != "ops"] == []


def test_native_core_includes_no_framework():
    forbidden = re.compile(r'#\s*include\s*[<"](Python\.h|pybind11|torch|ATen|c10)')
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        if path.parent.name != "bindings":
            assert not forbidden.search(path.read_text(encoding="utf-8")), f"{path} includes a framework header"


def test_code_that_is_compiled_for_each_instruction_set_stays_there():
    """Two sets must never share a symbol: what core/simd.h and core/int8.h define belongs to the *_cpu.cpp alone."""
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        if path.suffix in (".h", ".cpp", ".cu") and not path.name.endswith("_cpu.cpp") and path.name != "int8.h":
            found = re.search(r'#\s*include\s*"core/(simd|int8)\.h"', path.read_text(encoding="utf-8"))
            assert not found, f"{path} includes {found and found[0]}; only *_cpu.cpp may"


def test_screening_is_core_and_stands_below_the_ops():
    allowed = re.compile(r'#\s*include\s*(<[a-z_]+>|<immintrin\.h>|"(core|screen)/[a-z0-9_]+\.h")')
    for path in sorted((ROOT / "csrc/screen").iterdir()):
        if path.suffix in (".h", ".cpp"):
            lines = path.read_text(encoding="utf-8").splitlines()
            wrong = [line for line in lines if line.startswith("#include") and not allowed.match(line)]
            assert not wrong, f"{path}: screening may include the standard library, core/ and screen/; found {wrong}"


def test_sections_of_the_proof_exist():
    proof = (ROOT / "csrc/screen/PROOF.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^## (\d+)\.", proof, re.M))
    assert sections == {str(number) for number in range(1, 9)}
    named = {}
    for folder in ("csrc", "xpatch", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".h", ".cpp", ".cu", ".py"):
                text = path.read_text(encoding="utf-8")
                named |= dict.fromkeys(re.findall(r"PROOF\.md, section (\d+)", text), path)
    assert named and set(named) <= sections, {
        number: str(path) for number, path in named.items() if number not in sections
    }


def test_an_op_is_four_files():
    stems = {re.sub(r"(_cpu|_cuda)?\.(h|cpp|cu)$", "", path.name) for path in (ROOT / "csrc/ops").iterdir()}
    expected = {f"{stem}{end}" for stem in stems for end in (".h", ".cpp", "_cpu.cpp", "_cuda.cu")}
    assert {path.name for path in (ROOT / "csrc/ops").iterdir()} == expected


def test_no_file_is_two_rooms():
    code = {".py", ".pyi", ".cpp", ".h", ".cu"}
    folders = ("csrc", "xpatch", "exporters", "benchmarks", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in code]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > LINES_AT_MOST} == {}


def test_import_needs_only_the_core_packages():
    """Neither `import xpatch` nor `import xpatch.ops` loads what only the command line or the editors need."""
    import subprocess
    import sys

    code = (
        "import sys, xpatch, xpatch.ops\n"
        "heavy = ('transformers', 'typer', 'rich', 'onnx', 'onnxruntime', 'plotly', 'huggingface_hub')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
