"""Imports point one way."""

import ast

from conftest import ROOT

PACKAGE = ROOT / "efae_jax"
# From the bottom up; a module imports from layers below its own, or from its own package.
LAYERS = [
    {"errors", "recipes", "groups", "flow", "losses", "sampling", "metrics"},
    {"paths"},
    {"logs", "json_files"},
    {"models", "data", "sharding", "optim", "compilation"},
    {"distributed", "interrupts", "batch_sizes", "tensorstore_json"},
    {"convert"},
    {"methods", "embedders"},
    {"state", "checkpoint", "pictures", "panels", "report", "basis"},
    {"api", "compare"},
    {"validation", "evaluation", "reconstruct", "extract", "disentangled", "disentanglement"},
    {"workdir", "data_record", "exits", "host_memory", "warm_start"},
    {"run"},
    {"train", "encode", "embed", "lerp", "cache"},
    {"layout"},
    {"benchmark"},
    {"__main__"},
]
MATHEMATICS = {"groups", "flow", "losses", "sampling", "metrics"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part != "__init__":
            yield part, path


def level(part):
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


def test_every_module_has_a_layer():
    assert {part for part, _ in modules()} == set().union(*LAYERS)


def test_imports_point_down():
    for part, path in modules():
        for name in imports(path):
            if not name.startswith("efae_jax."):
                continue
            other = name.split(".")[1]
            if other in ("__version__",) or other == part:
                continue
            if part in MATHEMATICS:
                assert other in MATHEMATICS, f"{path} imports {name}"
            else:
                lower = level(other) < level(part)
                assert lower or other == "errors", f"{path} imports {name}"


def test_the_mathematics_knows_no_framework():
    for part, path in modules():
        if part in MATHEMATICS:
            for name in imports(path):
                assert name.split(".")[0] not in {"flax", "ml_collections", "absl", "optax"}, path
