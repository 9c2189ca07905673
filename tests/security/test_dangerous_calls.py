"""Source files make no call that loads pickles or runs text."""

from __future__ import annotations

import ast

import pytest
from source_code import ROOT, files, imports

PACKAGES = ("xray", "stages", "data_pipelines")
# Reads published weights of others, and torch refuses all but tensors (weights_only).
MAY_LOAD = {"xray/models/mae_checkpoints.py"}
# Ray workers send their results as pickles to the process that started them.
MAY_PICKLE = {"data_pipelines/curation/ray_engine.py"}
LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    ("torch", "load"), ("torch.jit", "load"), ("pd", "read_pickle"),
    ("np", "load"), ("numpy", "load"), ("yaml", "load"), ("yaml", "unsafe_load"),
    ("os", "system"), ("os", "popen"), ("shutil", "unpack_archive"),
}  # fmt: skip


def test_no_source_file_loads_pickles_or_runs_text() -> None:
    for path in [path for folder in PACKAGES for path in files(folder)]:
        own = str(path.relative_to(ROOT))
        if own not in MAY_PICKLE:
            assert not LOADERS & {module.split(".")[0] for module in imports(path)}, own
        for node in ast.walk(ast.parse(path.read_text())):
            if not harmless(node, own):
                raise AssertionError(f"{own}: {ast.unparse(node)}")


def harmless(node: ast.AST, own: str) -> bool:
    """Check that a syntax node of a source file cannot run what it reads."""
    if isinstance(node, ast.keyword):
        allows = isinstance(node.value, ast.Constant) and node.value.value is True
        risky = node.arg in ("allow_pickle", "trust_remote_code", "shell")
        return not (risky and allows) and (node.arg != "weights_only" or allows)
    if isinstance(node, ast.Constant):  # a key in a dict of arguments
        return node.value != "trust_remote_code" or own == "xray/models/llm_folder.py"
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
        return any(keyword.arg == "weights_only" for keyword in node.keywords)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id not in CALLS
    if isinstance(node, ast.Attribute):
        if node.attr in ("add_safe_globals", "extract", "extractall"):
            return False
        if ast.unparse(node) == "torch.load" and own in MAY_LOAD:
            return True
        named = node.attr in {name for _, name in METHODS}
        return not named or (ast.unparse(node.value), node.attr) not in METHODS
    return True


@pytest.mark.parametrize(
    "line",
    ["eval('1')", "torch.load('x')", "np.load('x')", "f(x, allow_pickle=True)", "os.system('x')",
     "f(weights_only=False)", "f(trust_remote_code=True)", "f(**{'trust_remote_code': True})",
     "torch.serialization.add_safe_globals([x])", "archive.extractall('x')", "yaml.load(x)"],
)  # fmt: skip
def test_dangerous_lines_are_detected(line: str) -> None:
    assert not all(harmless(node, "xray/some.py") for node in ast.walk(ast.parse(line)))
