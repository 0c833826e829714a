"""Imports run one way, and each seam to transformers is in a known file (docs/architecture.md)."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import coral_hf

PACKAGE = Path(coral_hf.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}

# a part may import what stands before it; parts of one line never import each other
ORDER = (
    ["target_name"],
    ["configuration_coral"],
    [
        "lm_head",
        "groups",
        "drafter_layers",
        "autotune",
        "hardware",
        "prompt_batch",
        "weights_digest",
    ],
    ["router", "draft_head"],
    ["group_kernel"],
    ["group_logits"],
    ["routed_head"],
    ["head_choice"],
    ["modeling_coral"],
    ["target"],
    ["checkpoints", "publishing"],
    ["decoding", "training"],
    ["__init__"],
    ["benchmark"],
    ["comparison", "head_comparison"],
    ["demo"],
    ["cli"],
    ["serving"],
)
# a method that is a door to a later part: imported when called, in a `try`, since code that is
# published with a checkpoint does without
DOORS = {
    "modeling_coral.py": {"coral_hf.checkpoints", "coral_hf.publishing", "coral_hf.target"},
}
RANKS = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
PUBLISHED = [
    f"{name}.py"
    for name in (
        "autotune",
        "configuration_coral",
        "draft_head",
        "drafter_layers",
        "group_kernel",
        "group_logits",
        "groups",
        "head_choice",
        "lm_head",
        "modeling_coral",
        "routed_head",
        "router",
        "target_name",
    )
]
PURE = ["decoding/tree.py", "decoding/verification.py"]
PURE += [f"training/{name}.py" for name in ("losses", "token_loss", "csra", "attention")]
# imported when they are needed: each costs seconds, or is not installed everywhere
LAZY = {"datasets", "peft", "matplotlib", "sklearn", "vllm", "transformers.trainer"}

# name of transformers → the files that know it
SEAMS = {
    "GenerationMixin": ["decoding/generate.py", "modeling_coral.py"],
    "get_input_embeddings": ["target.py"],
    "get_output_embeddings": ["modeling_coral.py", "target.py"],
    "_attn_implementation": ["target.py"],
    "DynamicCache": ["target.py"],
    "DynamicLayer": ["decoding/cache.py", "target.py"],
}


def part_of(module: str) -> str:
    """`coral_hf.decoding.tree` → `decoding`; names of the package itself are `__init__`'s."""
    part = module.split(".")[1:2]
    return part[0] if part and part[0] in RANKS else "__init__"


def imports(name: str) -> set[str]:
    """The modules that a file imports, at module level and inside functions, in full."""
    package = ".".join(["coral_hf", *Path(name).parts[:-1]])
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(relative, package)
            # `from . import training` names a module, `from .tree import Beam` does not
            found |= {module} if node.module else {f"{module}.{alias.name}" for alias in node.names}
    return found


def names(name: str) -> set[str]:
    """All names that a file imports or uses."""
    nodes = list(ast.walk(ast.parse(FILES[name].read_text())))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return used | {node.name for node in nodes if isinstance(node, ast.alias)}


def test_imports_run_one_way():
    edges = {
        (part_of(f"coral_hf.{name.removesuffix('.py').replace('/', '.')}"), part_of(module))
        for name in FILES
        for module in imports(name) - DOORS.get(name, set())
        if module.split(".")[0] == "coral_hf"
    }
    assert {("decoding", "target"), ("training", "modeling_coral"), ("cli", "benchmark")} <= edges
    assert not {(a, b) for a, b in edges if a != b and RANKS[a] <= RANKS[b]}


def test_every_file_has_its_place_in_the_order():
    assert {Path(name).parts[0].removesuffix(".py") for name in FILES} <= RANKS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_code_that_is_published_needs_no_more_than_transformers(name):
    own = {f"coral_hf.{other.removesuffix('.py')}" for other in PUBLISHED}
    roots = {module.split(".")[0] for module in imports(name) - own - DOORS.get(name, set())}
    # Triton is for CUDA alone: where it is not installed, published code loads without it
    optional = {"triton"} if name == "group_kernel.py" else set()
    needed = {"torch", "transformers", "huggingface_hub", "safetensors"}
    assert roots <= needed | optional | sys.stdlib_module_names


@pytest.mark.parametrize("name", PUBLISHED)
def test_code_that_is_published_loads_where_the_library_is_not_installed(name):
    assert "coral_hf" not in get_imports(FILES[name])
    own = {other.removesuffix(".py") for other in PUBLISHED}
    assert set(get_relative_imports(FILES[name])) <= own


@pytest.mark.parametrize("name", PURE)
def test_the_pure_core_knows_torch_only(name):
    roots = {module.split(".")[0] for module in imports(name) - {"coral_hf.decoding.tree"}}
    assert roots <= {"torch"} | sys.stdlib_module_names


@pytest.mark.parametrize("seam", SEAMS)
def test_a_seam_to_transformers_is_in_known_files(seam):
    assert [name for name in sorted(FILES) if seam in names(name)] == SEAMS[seam]


def test_importing_the_package_imports_nothing_slow_or_optional():
    # what transformers' own generation imports is not ours to spare
    script = (
        "import sys, transformers.generation.utils; own = set(sys.modules);"
        " import coral_hf; print(*set(sys.modules) - own)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert "coral_hf.decoding.loop" in found.stdout.split(), found.stderr
    assert not LAZY & set(found.stdout.split())
