"""The layout of the package: imports point one way, and no file or function grows without bound."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "normatch"

# From low to high: a module imports from its own layer and those before it. The longest prefix of its name decides.
LAYERS = (
    ("normatch", "normatch.errors"),
    ("normatch.data",),
    ("normatch.augment",),
    ("normatch.reference", "normatch.ops"),
    ("normatch.augment.native",),  # computes views with an op, whose arguments are drawn by the layers below
    ("normatch.flows",),
    ("normatch.config", "normatch.published.flags"),
    ("normatch.methods",),
    ("normatch.published",),
    ("normatch.model",),
    ("normatch.training",),
    ("normatch.tools",),
    ("normatch.bench",),
    ("normatch.cli",),
    ("normatch.__main__",),
)
# A run ends by drawing its figures, which are tools in their own right.
EXCEPTIONS = {
    ("normatch.training.trainer", "normatch.tools.plot"),
    ("normatch.training.trainer", "normatch.tools.flow_figures"),
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def layer(module):
    prefixes = {prefix: height for height, layer in enumerate(LAYERS) for prefix in layer}
    while module not in prefixes:
        module = module.rpartition(".")[0]
    return prefixes[module]


def imports(module, nested):
    """-> the modules of the package that `module` imports, at its top level or (`nested`) anywhere."""
    path = MODULES[module]
    tree = ast.parse(path.read_text())
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    result = set()
    for node in ast.walk(tree) if nested else top_level(tree):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            for alias in node.names:  # a module of a package, or a name in a module
                name = f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base
                result |= {name} & MODULES.keys()
    return result - {module}


def top_level(tree):
    """The statements that run when the module is imported."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)


def python(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)


def test_imports_point_one_way():
    wrong = [
        f"{module} imports {target}"
        for module in MODULES
        for target in imports(module, nested=True)
        if layer(target) > layer(module) and (module, target) not in EXCEPTIONS
    ]
    assert not wrong


def test_no_modules_import_each_other():
    graph = {module: imports(module, nested=False) for module in MODULES}
    assert [*TopologicalSorter(graph).static_order()], "raises CycleError, which names the modules"


@pytest.mark.parametrize("part", ["data", "augment", "config"])
def test_what_a_run_reads_knows_nothing_of_training(part):
    for module in MODULES:
        if module == f"normatch.{part}" or module.startswith(f"normatch.{part}."):
            assert not [t for t in imports(module, nested=False) if re.match(r"normatch\.(training|methods)\b", t)]


def test_the_product_needs_no_benchmark():
    for module in MODULES:
        if not module.startswith(("normatch.bench", "normatch.cli")):
            assert not [target for target in imports(module, nested=True) if target.startswith("normatch.bench")]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("normatch", "torch"),
        ("normatch", "numpy"),
        ("normatch.data", "torch"),
        ("normatch.ops", "PIL"),
        ("normatch.flows", "PIL"),
        ("normatch.model", "normatch.training"),
        ("normatch.methods", "normatch.training"),
        ("normatch.training.trainer", "normatch.bench"),
    ],
)
def test_importing_a_module_loads_nothing_from_above(module, absent):
    done = python(f"import sys, {module}; sys.exit({absent!r} in sys.modules)")
    assert done.returncode == 0, f"{module} loads {absent} {done.stderr}"


def test_the_package_has_fourteen_parts():
    entries = {path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    parts = {path.stem for path in entries} - {"__init__", "__main__"}
    assert len(parts) <= 14, sorted(parts)


def test_no_file_is_longer_than_500_lines():
    kinds = {".py", ".cpp", ".cu", ".h"}
    folders = (ROOT / name for name in ("normatch", "csrc", "tests", "benchmarks", "examples"))
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in kinds]
    assert len(files) > 100
    long = {str(path.relative_to(ROOT)): n for path in files if (n := len(path.read_text().splitlines())) > 500}
    assert not long


def test_no_function_is_longer_than_80_lines():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}, {node.end_lineno - node.lineno + 1} lines"
        for folder in ("normatch", "tests", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 80
    ]
    assert not long


def test_the_checks_can_fail():
    assert layer("normatch.published.flags") < layer("normatch.published.checkpoints") < layer("normatch.training.run")
    assert "normatch.data" in imports("normatch.config", nested=False)
    assert "normatch.training.trainer" in imports("normatch.tools.verify", nested=True)
    assert "normatch.training.trainer" not in imports("normatch.tools.verify", nested=False)
