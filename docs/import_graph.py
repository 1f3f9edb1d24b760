"""Draw which room of the package imports which, from the source.

    python docs/import_graph.py

Writes `docs/import-graph.svg` and prints all imports. Rooms stand on the rows that `tests/test_layering.py` gives them,
and an arrow points from a room to one that it imports; an import that a longer way of arrows implies is not drawn. The
picture's description holds all of them as text, which a test compares with the source.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from test_layering import EXCEPTIONS, FACADE, HEIGHT, LAYERS, PACKAGE, imports_of, module_name, room_of, within  # noqa: E402

PICTURE = ROOT / "docs" / "import-graph.svg"
LEFT_OUT = ("__main__",)

PLACES = {
    "types": 0.0,
    "reading": 1.3,
    "images": -0.2,
    "weights": 2.2,
    "encoders": -3.2,
    "assistants": -1.2,
    "datasets": 1.0,
    "evaluation": 3.2,
    "models": -1.5,
    "training": 3.2,
    "reward_fn": 0.25,
    "reward": -2.4,
    "composite": 0.0,
    "zoo": -0.7,
    "scorer": -1.3,
    "selection": -3.2,
    "embedded": 1.7,
    "benchmark": 3.2,
    "sampling": -2.2,
    "finetuning": 2.0,
    FACADE: -0.3,
    "report": -2.7,
    "cli": 2.0,
}
"""Where rooms stand on their rows: chosen here so that few arrows cross, and none passes behind a room."""

Graph = dict[str, list[str]]
"""By room, which others it imports; from the ground up."""


def import_graph(root: Path = ROOT) -> Graph:
    """Read the imports between rooms; those that point up by an exception are left out."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted((root / PACKAGE).rglob("*.py")):
        module = module_name(path, root)
        room = room_of(module, is_module=True)
        for item in imports_of(path, module):
            if not within(item.target, PACKAGE) or item.target == f"{PACKAGE}.__version__":
                continue
            other = room_of(item.target)
            if other != room and (room, other, item.function) not in EXCEPTIONS:
                found[room].add(other)
    rooms = [room for row in LAYERS for room in row if room not in LEFT_OUT]
    return {room: [other for other in rooms if other in found[room]] for room in rooms}


def direct(graph: Graph) -> set[tuple[str, str]]:
    """The imports that are not also reached by a longer way."""

    def below(room: str) -> set[str]:
        return {deep for other in graph[room] for deep in (other, *below(other))}

    return {
        (room, other)
        for room, others in graph.items()
        for other in others
        if not any(other in below(between) for between in others if between != other)
    }


def describe(graph: Graph) -> str:
    """One line a room: what it imports."""
    return "\n".join(f"{room}: {', '.join(others) or 'nothing'}" for room, others in graph.items())


def draw(graph: Graph, path: Path) -> None:
    """Draw the graph as SVG, the same bytes for the same graph and version of matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": PACKAGE, "font.family": "sans-serif"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 9.5))
    for room, other in sorted(direct(graph)):
        top, bottom = (PLACES[room], HEIGHT[room] - 0.22), (PLACES[other], HEIGHT[other] + 0.22)
        arrow = {"arrowstyle": "-|>", "color": "#27408b", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", xy=bottom, xytext=top, arrowprops=arrow, zorder=1)
    for room in graph:
        box = {"boxstyle": "round,pad=0.4", "facecolor": "#f4f6fb", "edgecolor": "#27408b"}
        shown = PACKAGE if room == FACADE else room
        axes.text(PLACES[room], HEIGHT[room], shown, ha="center", va="center", fontsize=11, bbox=box, zorder=2)
    axes.set(xlim=(-4, 4), ylim=(-0.5, max(HEIGHT[room] for room in graph) + 0.5))
    axes.axis("off")
    named = {"Date": None, "Title": "Imports between the rooms of aigiqa_reward", "Description": describe(graph)}
    figure.savefig(path, bbox_inches="tight", facecolor="white", metadata=named)
    pyplot.close(figure)


if __name__ == "__main__":
    draw(import_graph(), PICTURE)
    print(describe(import_graph()))
