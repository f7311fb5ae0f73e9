"""The layers of pear_kernels, read from the source: imports run down only, and no function has too many parameters."""

import ast
from pathlib import Path

import pytest

import pear_kernels

ROOT = Path(pear_kernels.__file__).parent
LAYERS = [  # lowest first; a module imports its own layer and those below
    ("options", "checks"),
    ("engine",),
    ("formulas",),
    ("objectives",),
    ("backends",),
    ("sharding",),
    ("ops",),
    ("losses",),
    ("modules", "plan"),
    ("huggingface",),
    ("__init__",),
]
MOST_PARAMETERS = 14
MORE_PARAMETERS = {  # the public losses, whose arguments are keywords, and one reference
    *("losses.pear.linear_pear_loss", "losses.weighted.linear_weighted_loss", "losses.policy.linear_policy_loss"),
    *("losses.distill.linear_distill_loss", "reference.naive_policy_loss"),
}
UPWARD_TODAY: set[tuple[str, str]] = set()  # (importer, imported) that break the order; empty it


def name_of(path: Path) -> str:
    """engine/walk.py: "engine.walk"; a package's own file: "engine.__init__"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}


def resolve(name: str) -> str | None:
    """The module of the package that `pear_kernels.name` is, if it is one."""
    return next((found for found in (name, f"{name}.__init__".lstrip(".")) if found in MODULES), None)


def imports(module: str) -> set[str]:
    """Modules of the package that `module` imports, in functions too."""
    found = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            # `from pear_kernels.engine import walk` imports a module, `from pear_kernels.losses import LossOutput` not
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if resolve(name.removeprefix("pear_kernels.")) else node.module for name in names]
        else:
            continue
        for name in names:
            if name == "pear_kernels" or name.startswith("pear_kernels."):
                found.add(resolve(name.removeprefix("pear_kernels").lstrip(".")))
    return found


IMPORTS = {module: imports(module) for module in MODULES}


def layer(module: str) -> int:
    return next(level for level, folders in enumerate(LAYERS) if module.split(".")[0] in folders)


def test_imports_run_down_only():
    upward = {
        (module, other)
        for module, others in IMPORTS.items()
        for other in others
        if module != "reference" and other != "reference" and layer(other) > layer(module)
    }
    assert upward == UPWARD_TODAY


def test_no_import_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join((*path, module))
        if module not in done:
            for other in IMPORTS[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_one_module_alone_loads_triton():
    """Beside the kernels themselves; `backends.triton.tiles` is a table and needs no triton."""
    others = {module for module in MODULES if not module.startswith("backends.triton.")}
    loading = {(m, o) for m in others for o in IMPORTS[m] if o.startswith("backends.triton")}
    assert {m for m, _ in loading} <= {"ops.backends", "plan"}
    assert {o for m, o in loading if m == "plan"} <= {"backends.triton.tiles"}
    assert not IMPORTS["backends.triton.tiles"] and "triton" not in imported_names("backends.triton.tiles")


def imported_names(module: str) -> set[str]:
    """First parts of the names of all modules that `module` imports."""
    nodes = list(ast.walk(MODULES[module]))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def test_the_reference_shares_no_code():
    assert not IMPORTS["reference"]
    assert not [module for module, others in IMPORTS.items() if "reference" in others]


@pytest.mark.parametrize("module", MODULES)
def test_no_function_has_too_many_parameters(module):
    """But those of `MORE_PARAMETERS`, and Triton's kernels, whose parameters are pointers, sizes and flags."""
    long = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            a = node.args
            count = len(a.posonlyargs + a.args + a.kwonlyargs) + (a.vararg is not None) + (a.kwarg is not None)
            is_kernel = any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
            if count > MOST_PARAMETERS and not is_kernel:
                long.add(f"{module}.{node.name}")
    assert long == {name for name in MORE_PARAMETERS if name.rpartition(".")[0] == module}
