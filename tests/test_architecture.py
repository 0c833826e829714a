"""Imports run one way, and each seam to transformers is in a known file: see architecture.md."""

import ast
import importlib.util
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from first_import import IMPORTED

import coral_hf

PACKAGE = Path(coral_hf.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}

# a part may import what stands before it; parts of one line never import each other
ORDER = (
    ["identity", "atomic", "lm_head"],
    ["target"],
    ["heads"],
    ["decoding"],
    ["drafters"],
    ["measure"],
    ["checkpoints", "hub"],
    ["training"],
    ["serving", "demo", "playground"],
    ["__init__"],
    ["cli"],
)
# `decoding` knows drafters by protocol and registry, `training` never meets the loop
APART = {("decoding", "drafters"), ("decoding", "training")}
RANKS = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
PURE = ["decoding/drafting.py", "decoding/chance.py", "drafters/tree_builders.py"]
PURE += [f"training/losses/{name}.py" for name in ("__init__", "token_loss")]
PURE += ["training/steps/attention.py"]
# imported when they are needed: each costs seconds, or is not installed everywhere
LAZY = {"datasets", "peft", "matplotlib", "vllm", "transformers.trainer"}

# name of transformers → the files that know it
SEAMS = {
    "GenerationMixin": [
        "decoding/generate.py",
        "decoding/guard/target.py",
        "decoding/preparation/needs.py",
        "drafters/model.py",
    ],
    "get_input_embeddings": ["target.py"],
    "get_output_embeddings": [
        "decoding/guard/target.py",
        "drafters/model.py",
        "target.py",
    ],
    "_attn_implementation": [
        *(f"decoding/guard/{name}.py" for name in ("foreign", "target", "trial")),
        "measure/lossless.py",
        "training/features/reading.py",
    ],
    "DynamicCache": ["decoding/guard/target.py", "target.py"],
    "DynamicLayer": [
        "decoding/caches/continuation.py",
        "decoding/caches/layers.py",
    ],
}


def part_of(module: str) -> str:
    """`coral_hf.decoding.loop` → `decoding`; names of the package itself are `__init__`'s."""
    part = module.split(".")[1:2]
    return part[0] if part and part[0] in RANKS else "__init__"


def module_of(name: str) -> str:
    """`decoding/loop.py` → `coral_hf.decoding.loop`; a folder's `__init__` is the folder."""
    module = f"coral_hf.{name.removesuffix('.py').replace('/', '.')}"
    return module.removesuffix(".__init__")


@cache
def nodes(name: str) -> list[ast.AST]:
    """All nodes of a file's syntax tree."""
    return list(ast.walk(ast.parse(FILES[name].read_text())))


@cache
def imports(name: str) -> set[str]:
    """The modules that a file imports, at module level and inside functions, in full."""
    package = ".".join(["coral_hf", *Path(name).parts[:-1]])
    found = set()
    for node in nodes(name):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(relative, package)
            # `from . import training` names a module, `from .tree import Beam` does not
            whole = {f"{module}.{alias.name}" for alias in node.names}
            found |= {module} if node.module else whole
            found |= whole & {*map(module_of, FILES)}
    return found


@cache
def names(name: str) -> set[str]:
    """All names that a file imports or uses."""
    used = {node.id for node in nodes(name) if isinstance(node, ast.Name)}
    used |= {node.attr for node in nodes(name) if isinstance(node, ast.Attribute)}
    return used | {node.name for node in nodes(name) if isinstance(node, ast.alias)}


def test_imports_run_one_way():
    edges = {
        (part_of(f"coral_hf.{name.removesuffix('.py').replace('/', '.')}"), part_of(module))
        for name in FILES
        for module in imports(name)
        if module.split(".")[0] == "coral_hf"
    }
    assert {("decoding", "target"), ("training", "drafters"), ("cli", "measure")} <= edges
    assert not {(a, b) for a, b in edges if a != b and RANKS[a] <= RANKS[b]}
    assert not APART & edges


def test_every_file_has_its_place_in_the_order():
    assert {Path(name).parts[0].removesuffix(".py") for name in FILES} <= RANKS.keys()


def test_files_import_each_other_in_no_circle():
    graph = {module_of(name): imports(name) & {*map(module_of, FILES)} for name in FILES}
    while leaves := [name for name, needed in graph.items() if not needed & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"circle among {sorted(graph)}"


def test_the_root_has_few_files_and_no_folder_many():
    counts = Counter(Path(name).parent.as_posix() for name in FILES)
    assert counts.pop(".") <= 5
    assert max(counts.values()) <= 12, counts.most_common(3)


@pytest.mark.parametrize("name", PURE)
def test_the_pure_core_knows_torch_only(name):
    roots = {module.split(".")[0] for module in imports(name) - {*map(module_of, PURE)}}
    assert roots <= {"torch"} | sys.stdlib_module_names


@pytest.mark.parametrize("seam", SEAMS)
def test_a_seam_to_transformers_is_in_known_files(seam):
    assert [name for name in sorted(FILES) if seam in names(name)] == SEAMS[seam]


def test_importing_the_package_imports_nothing_slow_or_optional():
    assert "coral_hf.decoding.loop" in IMPORTED
    assert not LAZY & IMPORTED
