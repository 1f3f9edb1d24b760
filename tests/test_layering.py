"""Imports point down only and not in circles, files and functions stay readable, importing stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "aigiqa_reward"

LAYERS = (
    ("types", "utils"),
    ("images",),
    ("encoders", "assistants", "datasets", "evaluation", "toy"),
    ("models",),
    ("rewards",),
    ("training",),
    ("sampling",),
    ("report",),
    ("finetuning",),
    ("bulk", "web"),
    ("cli",),
)
"""The folders of the package from the bottom up: each may import from the rows above it in this list, and itself."""

LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

FORBIDDEN = {
    "models": ("open_clip", "timm", "transformers", "diffusers", "PIL"),
    "rewards": ("diffusers", "PIL"),
    "encoders": ("diffusers", "PIL"),
    "training": ("diffusers.pipelines", "PIL"),
}
"""What a folder must not import: a model is given its towers, and pixels change in `images` alone."""

PUBLIC = (PACKAGE, *(f"{PACKAGE}.{room}" for room in ("images", "sampling", "finetuning", "report", "assistants")))
"""Modules that integrations and the scripts in examples/ may import from."""


def imports_of(path: Path, *, for_types: bool = True) -> Iterator[tuple[str, int]]:
    tree = ast.parse(path.read_text())
    if not for_types:
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def opens_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text in the machine's own encoding, such as code page 1252."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    modes = [a.value for a in call.args if isinstance(a, ast.Constant) and re.fullmatch("[rwax]b?[+]?", str(a.value))]
    opened = name == "open" and (bool(modes) or isinstance(call.func, ast.Name)) and "b" not in "".join(modes)
    given = any(keyword.arg in ("encoding", "opener") for keyword in call.keywords)
    whole = name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute)
    return (opened or whole) and not given


def test_the_encoding_of_text_files_is_given() -> None:
    for path in sources(PACKAGE, "integrations", "examples"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [f"{path}:{call.lineno}" for call in calls if opens_text(call)]


def room_of(name: str) -> str:
    return ([*name.split("."), ""])[1]


def violations(path: Path, room: str) -> Iterator[str]:
    for name, line in imports_of(path):
        other = room_of(name)
        if name.startswith(f"{PACKAGE}.") and other in LEVEL and other != room and LEVEL[other] >= LEVEL[room]:
            yield f"{path.name}:{line}: {room} imports {name}"
        if name.startswith(f"{PACKAGE}.") and other not in LEVEL and other != "__version__":
            yield f"{path.name}:{line}: {room} imports {name} from the list of public names"
    for name, line in imports_of(path, for_types=False):
        if name.startswith(FORBIDDEN.get(room, ("-",))):
            yield f"{path.name}:{line}: {room} imports {name}"


def test_imports_point_down_only() -> None:
    found = []
    for path in sources(PACKAGE):
        assert not [name for name, _ in imports_of(path) if name.startswith(".")], f"{path}: write imports absolutely"
        room = path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]
        if not room.startswith("__"):  # the list of public names, and `python -m`
            assert room in LEVEL, f"{path}: give it a place in LAYERS"
            found += [] if room == "cli" else violations(path, room)
    assert found == []


def test_an_import_that_points_up_is_found(tmp_path: Path) -> None:
    file = tmp_path / "clip.py"
    file.write_text("import torch\ndef f():\n    from aigiqa_reward.rewards.reward import Reward\n")
    assert list(violations(file, "encoders")) == ["clip.py:3: encoders imports aigiqa_reward.rewards.reward.Reward"]


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in sources(PACKAGE)}

    def at_import(path: Path) -> set[str]:
        found = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & names.keys()
                found |= inner or {str(node.module)}
        return found

    graph = {name: at_import(path) - {name} for name, path in names.items() if name != PACKAGE}
    while free := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]
    assert graph == {}


def test_integrations_and_examples_use_public_names_only() -> None:
    files = [*sources("integrations"), *sorted((ROOT / "examples").glob("*.py"))]
    used = [(path.name, name) for path in files for name, _ in imports_of(path) if name.partition(".")[0] == PACKAGE]
    assert used
    assert [(file, name) for file, name in used if name not in PUBLIC and name.rpartition(".")[0] not in PUBLIC] == []
    assert [(file, name) for file, name in used if name.rpartition(".")[2].startswith("_")] == []


def test_functions_and_example_scripts_are_short() -> None:
    long = []
    for path in sources(PACKAGE, "integrations"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > 60:
                long.append(f"{path.name}:{node.lineno}: {node.name} has {lines} lines")
    long += [p.name for p in (ROOT / "examples").glob("*.py") if len(p.read_text().splitlines()) > 80]
    assert long == []


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    ("statement", "unloaded"),
    [
        ("import aigiqa_reward, aigiqa_reward.cli", {"torch", "diffusers", "transformers", "peft", "accelerate"}),
        (
            "from aigiqa_reward import Reward, Scorer, CompositeReward, create_reward, list_rewards, rerank, BestOfN",
            {"diffusers", "peft", "accelerate", "trl", "transformers", "open_clip", "matplotlib"},
        ),
    ],
)
def test_importing_loads_no_heavy_library(statement: str, unloaded: set[str]) -> None:
    loaded = loaded_by(statement)
    assert PACKAGE in loaded
    assert not loaded & unloaded
