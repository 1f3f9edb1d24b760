"""The node pack as ComfyUI loads it, and its workflows."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PACK = Path(__file__).resolve().parents[1] / "integrations" / "comfyui"
WORKFLOWS = sorted((PACK / "example_workflows" / "api").glob("*.json"))
DRAWN = [path.parents[1] / path.name for path in WORKFLOWS]  # the same with positions, for the front end


def load_pack(folder: Path = PACK) -> ModuleType:
    """Import the folder as ComfyUI does: from its place, under a name that is its path."""
    name = str(folder).replace(".", "_x_")
    specification = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def read_workflow(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def as_api(drawn: dict[str, Any]) -> dict[str, Any]:
    """A workflow of the front end as the server runs it: values by the names of their widgets."""
    sources = {link: [str(node), slot] for link, node, slot, *_ in drawn["links"]}
    workflow = {}
    for node in drawn["nodes"]:
        inputs = [entry for entry in node.get("inputs", []) if entry["type"] != "IMAGEUPLOAD"]  # a button
        widgets = [entry["name"] for entry in inputs if "widget" in entry]
        if "seed" in widgets:
            widgets.insert(widgets.index("seed") + 1, "control_after_generate")
        values = dict(zip(widgets, node.get("widgets_values", []), strict=False))
        values |= {entry["name"]: sources[entry["link"]] for entry in inputs if entry["link"] is not None}
        values.pop("control_after_generate", None)
        workflow[str(node["id"])] = {"class_type": node["type"], "_meta": {"title": node["title"]}, "inputs": values}
    return workflow


def workflow_faults(workflow: dict[str, Any], nodes: dict[str, Any]) -> list[str]:
    """What ComfyUI would refuse in the pack's nodes: unknown or missing inputs, values that are none of a choice, links
    to nowhere, and links between them of another type."""
    faults = []
    for place, node in workflow.items():
        links = {name: value for name, value in node["inputs"].items() if isinstance(value, list)}
        faults += [f"{place}.{name}: no node {link[0]}" for name, link in links.items() if link[0] not in workflow]
        if node["class_type"] not in nodes:
            continue
        declared = nodes[node["class_type"]].INPUT_TYPES()
        known = declared["required"] | declared.get("optional", {})
        faults += [f"{place}: lacks {name}" for name in declared["required"].keys() - node["inputs"].keys()]
        faults += [f"{place}: has no input {name}" for name in node["inputs"].keys() - known.keys()]
        for name, (kind, _) in known.items():
            value = node["inputs"].get(name)
            if isinstance(kind, list) and value is not None and value not in kind:
                faults.append(f"{place}.{name}: {value!r} is none of {kind}")
            source = workflow.get(links[name][0], {}).get("class_type") if name in links else None
            if source in nodes and nodes[source].RETURN_TYPES[links[name][1]] != kind:
                faults.append(f"{place}.{name}: not a {kind}")
    return faults
