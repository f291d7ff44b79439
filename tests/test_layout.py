"""The package keeps its layers: imports go down only and in no circle, and modules and functions stay short.

Every import statement counts, also one inside a function. A module may import what stands below its own layer, and
what stands in its own layer as long as the imports form no circle.
"""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (  # from the top; a name stands for the module and for all modules of a package
    ("llmc.__main__", "llmc.train", "llmc.generate", "llmc.evaluate", "llmc.export", "llmc.plot", "llmc.test_gpt2",
     "llmc.data.__main__"),
    ("llmc", "llmc.api"),
    ("llmc.training",),
    ("llmc.loading", "llmc.generation"),
    ("llmc.parallel", "llmc.files", "llmc.data"),
    ("llmc.gpt2",),
    ("llmc.model",),
    ("llmc.devices",),
    ("llmc.cuda", "llmc.cpu", "llmc.simt"),
    ("llmc.buffers", "llmc.rand", "llmc.sampler"),
    ("llmc.command",),
    ("llmc.errors",),
)  # fmt: skip
PASSES = ("forward_pass", "backward_pass")  # they are read from top to bottom, and may be longer than other functions


@functools.cache
def modules():
    """{dotted name: path} of every module of the package."""
    found = {}
    for path in sorted((ROOT / "llmc").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name, path):
    """The modules of the package that a module imports, wherever the statement stands."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "llmc")
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else None
            source = ".".join(filter(None, (base, node.module)))
            if source.split(".")[0] == "llmc":
                for alias in node.names:  # `from llmc import cpu` imports the module llmc.cpu, not a name of llmc
                    yield f"{source}.{alias.name}" if f"{source}.{alias.name}" in modules() else source


@functools.cache
def graph():
    return {name: sorted(set(imported(name, path)) - {name}) for name, path in modules().items()}


def layer(name):
    """The place of a module's layer, counted from the top: that of the longest name that fits."""
    fitting = [
        (len(prefix), i)
        for i, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if name == prefix or (name.startswith(prefix + ".") and prefix != "llmc")
    ]
    assert fitting, f"{name} stands in no layer: put it into LAYERS"
    return max(fitting)[1]


def upward(imports):
    """Imports that go up, a line each."""
    return [f"{a} imports {b}" for a, others in imports.items() for b in others if layer(b) < layer(a)]


def circle(imports):
    """The modules of one circle of imports, or None."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        found = next(filter(None, map(visit, imports.get(name, ()))), None)
        path.pop()
        done.add(name)
        return found

    return next(filter(None, map(visit, imports)), None)


def test_imports_go_down_only():
    assert not upward(graph()), "\n".join(upward(graph()))


def test_there_is_no_circle():
    assert circle(graph()) is None, " -> ".join(circle(graph()))


def test_the_checks_notice():
    """An import inside a function, a relative one and a circle are seen."""
    assert upward({"llmc.model": ["llmc.training.loop"], "llmc.train": ["llmc.model"]})
    assert (
        circle({"a": ["b"], "b": ["c"], "c": ["a"]}) == ["a", "b", "c", "a"] and circle({"a": ["b"], "b": []}) is None
    )
    assert "llmc.cuda.module" in imported_by("llmc.cuda.gelu", "from . import module")
    assert "llmc.errors" in imported_by("llmc.cuda.gelu", "def f():\n    from ..errors import UserError")
    assert layer("llmc.data.__main__") < layer("llmc.data.loader") and layer("llmc") < layer("llmc.training.loop")


def imported_by(name, source):
    class Stand:
        name = "x.py"
        read_text = staticmethod(lambda: source)

    return set(imported(name, Stand()))


def functions(path):
    """(name, lines without the docstring, whether it reads flags of a parameter `args`) of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            text = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
            docstring = first.end_lineno - first.lineno + 1 if text else 0
            parameters = {arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
            read = {
                n.value.id for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
            }
            yield node.name, node.end_lineno - node.lineno + 1 - docstring, "args" in parameters & read


@pytest.mark.parametrize("name", modules())
def test_a_module_is_read_at_once(name):
    path = modules()[name]
    lines = len(path.read_text().splitlines())
    assert lines <= 600, f"{name} has {lines} lines"
    long = [f"{function} has {n} lines" for function, n, _ in functions(path) if n > (90 if function in PASSES else 60)]
    assert not long, f"{name}: {', '.join(long)}"


def test_the_model_file_is_read_in_one_sitting():
    lines = len(modules()["llmc.gpt2"].read_text().splitlines())
    assert lines <= 350, lines


def test_no_library_function_takes_the_namespace_of_flags():
    """Settings are made of the flags once, in one module; what follows takes the values it needs."""
    found = []
    for name, path in modules().items():
        if layer(name) > 0 and name != "llmc.training.settings":
            found += [f"{name}.{function}" for function, _, takes in functions(path) if takes]
    assert not found, found
