"""Nothing that a caller sends is imported, unpickled or evaluated: the source has no place that could."""

import ast
from pathlib import Path

import pytest

import lossd_server

ROOT = Path(lossd_server.__file__).parents[2]
SOURCES = sorted(
    path
    for package in ("server/lossd_server", "client/lossd_client", "proto/lossd")
    for path in (ROOT / package).rglob("*.py")
    if "_pb2" not in path.name
)

MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "runpy",
    "code",
}
FUNCTIONS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    ("torch", "load"), ("numpy", "load"), ("np", "load"), ("torch", "compile"), ("yaml", "load"),
    ("importlib", "import_module"), ("os", "system"), ("os", "popen"),
}  # fmt: skip
EXPECTED = {
    ("server/lossd_server/engine/custom.py", "importlib.import_module"),  # what the operator named
}


def dangers_of(path):
    """What in a file loads, imports or evaluates what it is given."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            yield node.module
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
            yield node.func.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in METHODS:
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "shell"}:
            yield node.arg


def test_only_the_operators_loader_imports_by_name():
    assert len(SOURCES) > 100
    found = {(str(path.relative_to(ROOT)), danger) for path in SOURCES for danger in dangers_of(path)}
    assert found == EXPECTED


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "importlib.import_module(name)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_what_is_looked_for_is_found(tmp_path, text):
    (tmp_path / "a.py").write_text(text)
    assert list(dangers_of(tmp_path / "a.py"))


def test_calls_reach_custom_losses_by_name_alone():
    """The loader is called once, with the operator's own settings."""
    callers = [path for path in SOURCES if "load_custom_losses(" in path.read_text()]
    names = {str(path.relative_to(ROOT)) for path in callers}
    assert names == {"server/lossd_server/engine/custom.py", "server/lossd_server/rpc/server.py"}
