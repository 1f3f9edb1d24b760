"""Imports point down only. Read from the source, so that an import inside a function counts as well."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "aigiqa_reward"
FACADE = "__init__"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("types", "reading"),
    ("images", "weights"),
    ("encoders", "assistants", "datasets", "evaluation"),
    ("models",),
    ("training",),  # uses models, datasets and evaluation, and knows no reward
    ("reward_fn",),
    ("reward", "composite"),
    ("zoo",),
    ("scorer", "selection", "embedded", "benchmark"),
    ("sampling",),
    ("finetuning",),
    (FACADE,),  # the package's own lazy exports
    ("report",),
    ("cli",),
    ("__main__",),
)
"""The rooms of the package from the ground up. A room may import from the rows below its own, and from itself."""

HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}

EXCEPTIONS = {
    # Reward.save_pretrained and from_pretrained are methods of the class, but what they write and read is a zoo entry:
    # its name, its configuration and the builder of that name. Both import zoo only when they are called.
    ("reward", "zoo", "_save_pretrained"),
    ("reward", "zoo", "_from_pretrained"),
}
"""Imports that point up: importing room, imported room, the function that holds the import."""

NOT_BELOW = {("models", "encoders")}
"""Rooms that must not be imported although they lie below: a model is given its encoder."""

_PURE = (
    "types",
    "images",
    "weights",
    "encoders",
    "models",
    "datasets",
    "evaluation",
    "training",
    "reward_fn",
    "reward",
    "scorer",
)

FORBIDDEN_LIBRARIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("open_clip", ("models",)),
    ("timm", ("models",)),
    ("transformers", ("models",)),
    ("diffusers", (*_PURE, "selection")),
    ("PIL", tuple(room for room in _PURE if room != "images")),
    ("torchvision.transforms", tuple(HEIGHT)),
    ("PIL.ImageOps", tuple(room for room in HEIGHT if room != "images")),
    ("PIL.ImageFilter", tuple(room for room in HEIGHT if room != "images")),
    ("PIL.ImageEnhance", tuple(room for room in HEIGHT if room != "images")),
)
"""Libraries, and the rooms that must not import them."""

ON_THE_TENSOR_PATH = ("models", "encoders", "reward")
LEAVES_THE_GRAPH = ("numpy", "from_numpy")
"""Calls that take pixels out of torch, which the differentiable path must not make."""

PUBLIC_ONLY = ("integrations", "examples")
PUBLIC_WITHOUT_LIST = (f"{PACKAGE}.images",)
"""Modules that users are sent to by errors (images.from_vae, images.from_bhwc) and whose names without _ are public."""

DOCUMENTED = (
    PACKAGE,
    *(f"{PACKAGE}.{room}" for room in ("images", "sampling", "finetuning", "report", "assistants")),
)
"""What integrations may import from: each is shown to users in README.md or in a page of docs for users."""

ASSET_RECIPES = ("examples/train_compact", "examples/train_generator", "examples/train_systems")
"""Folders that make the embedded checkpoints again from the package's inner parts; not scripts for users to copy."""


@dataclass(frozen=True)
class Import:
    """One imported thing: its full dotted name, where it stands, and the function around it."""

    target: str
    line: int
    function: str


def imports_of(path: Path, module: str) -> Iterator[Import]:
    """Every import in a file, also inside functions, under TYPE_CHECKING and through import_module("...")."""

    def visit(node: ast.AST, function: str) -> Iterator[Import]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                parents = package[: len(package) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (Import(f"{base}.{alias.name}", node.lineno, function) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield Import(str(first.value), node.lineno, function)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(ast.parse(path.read_text()), "")


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str, *, is_module: bool = False) -> str:
    """The room a dotted name of the package belongs to; names of the package itself are the facade's."""
    inner = module.split(".")[1:]
    if not inner or (inner[0].startswith("__") and inner[0] != "__main__"):
        return FACADE
    return inner[0] if inner[0] in HEIGHT or len(inner) > 1 or is_module else FACADE


def within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def layer_violations(root: Path) -> list[str]:
    """What in root/aigiqa_reward breaks the rules, one line each."""
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        module = module_name(path, root)
        room = room_of(module, is_module=True)
        place = path.relative_to(root).as_posix()
        if room not in HEIGHT:
            found.append(f"{place}: {room} has no layer; give it one in LAYERS")
            continue
        for item in imports_of(path, module):
            reason = _upward(room, item) if within(item.target, PACKAGE) else _foreign(room, item)
            if reason:
                found.append(f"{place}:{item.line}: {reason}")
        if room in ON_THE_TENSOR_PATH:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in LEAVES_THE_GRAPH:
                    found.append(f"{place}:{node.lineno}: .{node.attr} leaves the differentiable path")
    return found


def _upward(room: str, item: Import) -> str | None:
    if item.target == f"{PACKAGE}.__version__":
        return None
    imported = room_of(item.target)
    if imported not in HEIGHT:
        return f"{imported} has no layer; give it one in LAYERS"
    if imported == room or (room, imported, item.function) in EXCEPTIONS:
        return None
    if (room, imported) in NOT_BELOW:
        return f"{room} must not import {imported}"
    return f"{room} imports {imported}, which is not below it" if HEIGHT[imported] >= HEIGHT[room] else None


def _foreign(room: str, item: Import) -> str | None:
    for library, rooms in FORBIDDEN_LIBRARIES:
        if room in rooms and within(item.target, library):
            return f"{room} must not import {library}"
    return None


def public_names(package_folder: Path) -> set[str]:
    """The names that a package's __init__.py lists in __all__."""
    init = package_folder / "__init__.py"
    for node in ast.parse(init.read_text()).body if init.is_file() else []:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def public_name_violations(root: Path) -> list[str]:
    """Imports in integrations and examples of names that the package does not list as public."""
    found = []
    for folder in PUBLIC_ONLY:
        for path in sorted((root / folder).rglob("*.py")):
            place = path.relative_to(root).as_posix()
            if place.startswith(tuple(f"{recipe}/" for recipe in ASSET_RECIPES)):
                continue
            for item in [*imports_of(path, module_name(path, root)), *_reached(path)]:
                if not within(item.target, PACKAGE):
                    continue
                home = item.target if item.target in DOCUMENTED else item.target.rpartition(".")[0]
                if not _is_public(root, item.target) or (folder == "integrations" and home not in DOCUMENTED):
                    found.append(f"{place}:{item.line}: {item.target} is not public")
    return found


def _reached(path: Path) -> Iterator[Import]:
    """What is reached through the package's own name: after `import aigiqa_reward`, aigiqa_reward.rewards.factory.SPECS."""
    for node in ast.walk(ast.parse(path.read_text())):
        named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == PACKAGE
        if named and not node.attr.startswith("__"):
            yield Import(f"{PACKAGE}.{node.attr}", node.lineno, "")


def _is_public(root: Path, target: str) -> bool:
    if target in (PACKAGE, *PUBLIC_WITHOUT_LIST):
        return True
    home, _, name = target.rpartition(".")
    if home in PUBLIC_WITHOUT_LIST:
        return not name.startswith("_")
    return name in public_names(root / Path(*home.split(".")))


def _hands_on(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A docstring and a call: as long as its list of parameters, such as a command's options."""
    return len(node.body) == 2 and isinstance(node.body[1], ast.Expr)


def length_violations(
    root: Path, *, file_lines: int = 300, function_lines: int = 60, example_lines: int = 80
) -> list[str]:
    """Files and functions that are too long to be read at once."""
    found = []
    for path in sorted([*(root / PACKAGE).rglob("*.py"), *(root / "integrations").rglob("*.py")]):
        text, place = path.read_text(), path.relative_to(root).as_posix()
        if (lines := len(text.splitlines())) > file_lines:
            found.append(f"{place}: {lines} lines, more than {file_lines}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > function_lines and not _hands_on(node):
                    found.append(f"{place}:{node.lineno}: {node.name} has {lines} lines, more than {function_lines}")
    for path in sorted((root / "examples").glob("*.py")):
        if (lines := len(path.read_text().splitlines())) > example_lines:
            found.append(f"examples/{path.name}: {lines} lines, more than {example_lines}")
    return found


# --------------------------------------------------------------------------------------------- this repository


def test_imports_point_down_only():
    assert layer_violations(ROOT) == []


def test_integrations_and_examples_use_public_names_only():
    assert public_name_violations(ROOT) == []
    for folder in PUBLIC_ONLY:  # so that nothing is found because there is nothing
        paths = sorted((ROOT / folder).rglob("*.py"))
        assert any(within(item.target, PACKAGE) for path in paths for item in imports_of(path, module_name(path, ROOT)))


def test_what_integrations_may_import_from_is_shown_to_users():
    pages = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "how-to").glob("*.md"))
    shown = "\n".join(page.read_text() for page in pages)
    assert [module for module in DOCUMENTED if module not in shown] == []


def test_files_and_functions_are_short():
    assert length_violations(ROOT) == []


def test_every_exception_is_still_needed():
    used = {
        ("reward", room_of(item.target), item.function)
        for item in imports_of(ROOT / PACKAGE / "reward.py", f"{PACKAGE}.reward")
        if within(item.target, PACKAGE)
    }
    assert used >= EXCEPTIONS


# --------------------------------------------------------------------------------------------- the checks can fail

GOOD_TREE = {
    "aigiqa_reward/__init__.py": '__all__ = ["Reward", "Scorer"]\n__version__ = "1"\n',
    "aigiqa_reward/types.py": "import torch\n",
    "aigiqa_reward/images.py": "from PIL import Image, ImageOps\nfrom aigiqa_reward.types import Images\n",
    "aigiqa_reward/weights.py": "import safetensors\n",
    "aigiqa_reward/encoders/__init__.py": "",
    "aigiqa_reward/encoders/clip.py": "import open_clip\nfrom aigiqa_reward import images\nfrom . import text\n",
    "aigiqa_reward/encoders/text.py": "from aigiqa_reward.types import Images\n",
    "aigiqa_reward/models/base.py": "from aigiqa_reward.types import Images\n",
    "aigiqa_reward/models/mst.py": "from aigiqa_reward.models.base import Model\nfrom .base import Model\n",
    "aigiqa_reward/reward.py": (
        "from aigiqa_reward.models.base import Model\n"
        "class Reward:\n    def _save_pretrained(self):\n        from aigiqa_reward.rewards.factory import save\n"
    ),
    "aigiqa_reward/zoo.py": "from aigiqa_reward import __version__\nfrom aigiqa_reward.encoders.clip import Clip\n",
    "aigiqa_reward/scorer.py": "from aigiqa_reward import images as pixels\n",
    "aigiqa_reward/selection.py": "import math\n",
    "aigiqa_reward/sampling/__init__.py": '__all__ = ["BestOfN"]\n',
    "aigiqa_reward/evaluation/__init__.py": '__all__ = ["srcc"]\n',
    "aigiqa_reward/sampling/best_of_n.py": "import diffusers\nfrom aigiqa_reward.rewards.scorer import Scorer\n",
    "aigiqa_reward/cli.py": "from aigiqa_reward import Reward\nfrom aigiqa_reward.sampling import BestOfN\n",
    "integrations/trl/reward.py": (
        "import aigiqa_reward\nfrom aigiqa_reward import Reward\nfrom aigiqa_reward.images import to_pil\n"
        "from aigiqa_reward.sampling import BestOfN\nfrom .prompts import x\n"
        "print(aigiqa_reward.__version__, aigiqa_reward.Scorer)\n"
    ),
    "examples/score.py": "import aigiqa_reward\nfrom aigiqa_reward.sampling import BestOfN\n",
    "examples/train_compact/train.py": "from aigiqa_reward.encoders.clip import Clip\n",
}

IMPORT_VIOLATIONS = {
    "types looks up": ("types.py", "from aigiqa_reward.images import load", "types imports images"),
    "images looks up": ("images.py", "from aigiqa_reward.models.base import Model", "images imports models"),
    "images looks aside": ("images.py", "import aigiqa_reward.utils.io", "images imports weights"),
    "weights looks aside": ("weights.py", "from aigiqa_reward import images", "weights imports images"),
    "encoders look up": ("encoders/text.py", "from aigiqa_reward.models import base", "encoders imports models"),
    "encoders know assistants": (
        "encoders/text.py",
        "import aigiqa_reward.assistants.lmm",
        "encoders imports assistants",
    ),
    "models know encoders": (
        "models/mst.py",
        "from aigiqa_reward.encoders.clip import Clip",
        "must not import encoders",
    ),
    "models know encoders, relatively": ("models/mst.py", "from ..encoders import clip", "must not import encoders"),
    "models know open_clip": ("models/mst.py", "import open_clip", "models must not import open_clip"),
    "models know timm": ("models/mst.py", "from timm.layers import Mlp", "models must not import timm"),
    "models know transformers": ("models/mst.py", "import transformers.models", "models must not import transformers"),
    "models know rewards": (
        "models/base.py",
        "from aigiqa_reward.rewards.reward import Reward",
        "models imports reward",
    ),
    "training knows rewards": (
        "training/fit.py",
        "from aigiqa_reward.rewards.factory import create_reward",
        "training imports zoo",
    ),
    "reward knows diffusers": ("reward.py", "from diffusers import AutoencoderKL", "reward must not import diffusers"),
    "reward knows zoo": ("reward.py", "from aigiqa_reward.rewards.factory import SPECS", "reward imports zoo"),
    "reward knows scorer": ("reward.py", "from aigiqa_reward.rewards.scorer import Scorer", "reward imports scorer"),
    "zoo knows scorer": ("zoo.py", "from aigiqa_reward.rewards.scorer import Scorer", "zoo imports scorer"),
    "scorer knows sampling": ("scorer.py", "from aigiqa_reward.sampling import BestOfN", "scorer imports sampling"),
    "selection knows diffusers": ("selection.py", "import diffusers", "selection must not import diffusers"),
    "sampling looks up": ("sampling/a.py", "from aigiqa_reward.finetuning import draft", "sampling imports finetuning"),
    "sampling knows reports": ("sampling/a.py", "from aigiqa_reward import report", "sampling imports report"),
    "the facade is used inside": ("scorer.py", "from aigiqa_reward import Reward", "scorer imports __init__"),
    "a report knows the command": ("report.py", "from aigiqa_reward.cli import app", "report imports cli"),
    "evaluation knows datasets": ("evaluation.py", "from aigiqa_reward import datasets", "evaluation imports datasets"),
    "pixels change in models": ("models/mst.py", "from PIL import Image", "models must not import PIL"),
    "pixels change in sampling": ("sampling/a.py", "from PIL import ImageOps", "must not import PIL.ImageOps"),
    "a second preprocessing": ("encoders/text.py", "from torchvision import transforms", "torchvision.transforms"),
    "another preprocessing": ("scorer.py", "import torchvision.transforms.v2", "torchvision.transforms"),
    "a new room": ("utils.py", "import math", "utils has no layer"),
    "an unknown room": ("sampling/a.py", "from aigiqa_reward.utils import x", "utils has no layer"),
    "models leave the graph": ("models/mst.py", "def f(x):\n    return x.numpy()", ".numpy leaves"),
    "encoders leave the graph": ("encoders/text.py", "import torch\ny = torch.from_numpy(0)", ".from_numpy leaves"),
    "inside a function": ("types.py", "def f():\n    import aigiqa_reward.rewards.factory", "types imports zoo"),
    "for types only": (
        "types.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from aigiqa_reward.rewards.factory import x",
        "types imports zoo",
    ),
    "by name": (
        "types.py",
        "import importlib\nimportlib.import_module('aigiqa_reward.rewards.factory')",
        "types imports zoo",
    ),
}


def write_tree(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write_tree(tmp_path, GOOD_TREE)
    return tmp_path


def test_a_tree_that_keeps_the_rules_passes(tree):
    assert layer_violations(tree) == []
    assert public_name_violations(tree) == []
    assert length_violations(tree) == []


@pytest.mark.parametrize("name", IMPORT_VIOLATIONS)
def test_a_broken_rule_of_layers_is_found(tree, name):
    place, code, message = IMPORT_VIOLATIONS[name]
    path = tree / PACKAGE / place
    before = path.read_text() if path.exists() else ""
    write_tree(tree, {f"{PACKAGE}/{place}": f"{before}{code}\n"})
    [found] = layer_violations(tree)
    assert found.startswith(f"{PACKAGE}/{place}:")
    assert message in found


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("integrations/comfyui/nodes.py", "from aigiqa_reward.models.base import Model"),
        ("integrations/comfyui/nodes.py", "from aigiqa_reward.images import _crops"),
        ("integrations/comfyui/nodes.py", "from aigiqa_reward.rewards.ranking import rank"),
        ("integrations/comfyui/nodes.py", "from aigiqa_reward.evaluation import srcc"),
        ("integrations/comfyui/nodes.py", "from aigiqa_reward import report"),
        ("integrations/comfyui/nodes.py", "import aigiqa_reward\nprint(aigiqa_reward.rewards.factory.SPECS)"),
        ("integrations/trl/reward.py", "from aigiqa_reward.sampling.best_of_n import BestOfN"),
        ("examples/score.py", "from aigiqa_reward import load_everything"),
        ("examples/score.py", "import aigiqa_reward.rewards.factory"),
        ("examples/score.py", "def f():\n    from aigiqa_reward.rewards.reward import Reward"),
        ("examples/train_other/train.py", "from aigiqa_reward.encoders.clip import Clip"),
    ],
)
def test_an_import_of_what_is_not_public_is_found(tree, place, code):
    write_tree(tree, {place: code + "\n"})
    [found] = public_name_violations(tree)
    assert found.startswith(f"{place}:")
    assert "is not public" in found


def test_what_is_too_long_is_found(tree):
    body = "    pass\n" * 60
    write_tree(
        tree,
        {
            f"{PACKAGE}/types.py": "x = 1\n" * 301,
            f"{PACKAGE}/zoo.py": f"class A:\n    async def f(self):\n{body.replace('    ', '        ')}",
            f"{PACKAGE}/scorer.py": f"def g():\n{body[:-9]}x = 1\n" + "x = 1\n" * 200,
            "examples/score.py": "x = 1\n" * 81,
            "integrations/comfyui/nodes.py": "x = 1\n" * 301,
        },
    )
    assert length_violations(tree) == [
        "aigiqa_reward/types.py: 301 lines, more than 300",
        "aigiqa_reward/zoo.py:2: f has 61 lines, more than 60",
        "integrations/comfyui/nodes.py: 301 lines, more than 300",
        "examples/score.py: 81 lines, more than 80",
    ]


# --------------------------------------------------------------------------------------------- what is really loaded

HEAVY = ("diffusers", "peft", "accelerate", "trl", "transformers", "open_clip", "timm")


def loaded_by(statement: str) -> set[str]:
    """Names of the top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(result.stdout.split())


def test_importing_the_package_loads_nothing_else():
    loaded = loaded_by("import aigiqa_reward")
    assert PACKAGE in loaded
    assert not loaded.intersection(HEAVY)
    outside = {name for name in loaded - loaded_by("pass") if name not in sys.stdlib_module_names}
    assert outside == {PACKAGE}


@pytest.mark.parametrize(
    "statement",
    [
        "from aigiqa_reward import Reward, CompositeReward, Scorer, RewardOutput, create_reward, list_rewards",
        "import aigiqa_reward.rewards.ranking, aigiqa_reward.utils.io, aigiqa_reward.images",
        "from aigiqa_reward import BestOfN, rerank",
    ],
)
def test_scoring_and_selection_load_no_pipeline_or_encoder_library(statement):
    loaded = loaded_by(statement)
    assert "torch" in loaded
    assert not loaded.intersection(HEAVY)


def test_what_is_loaded_is_seen():
    assert {"timm", "torch"} <= loaded_by("import timm")
