"""The prompt in a graph of ComfyUI: the texts that reach the inputs of its samplers. Nothing is executed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_WORK, _PER_NODE, _DEPTH = 2**24, 1000, 200
"""Characters that may be joined, those that a visit of a node counts for, and nodes in a row."""

_ENCODED = re.compile(r"text(_\w)?|prompt|user_prompt|clip_[lg]|t5xxl|llama|bert|mt5xl|qwen25_7b")
"""Inputs of nodes that encode texts."""

_JOINED = re.compile(r"(text|string|str|value|prompt)_?\w?\d?")
"""Inputs of nodes that hold or join texts."""

_JOINS = ("delimiter", "separator", "clean_whitespace")

_NO_TEXT = re.compile(r"clip\w*|(style_)?model|vae|images?|pixels|masks?|control_net|samples|latent\w*")
"""Inputs through which no text reaches a conditioning."""


def prompts_of(graph: Any) -> list[tuple[str, str]]:
    """Return the positive and the negative text of each sampler that has a positive one; each pair once.

    Args:
        graph: what ComfyUI writes as `prompt`, {id: {"class_type": name, "inputs": {name: value or [id, output]}}}.

    Raises:
        ValueError: not such a graph, a cycle, too large, or a text that a node made when it ran.
    """
    if not isinstance(graph, dict):
        raise ValueError(f"expected ComfyUI's graph of nodes, got {type(graph).__name__}")
    nodes = {
        key: each for key, each in graph.items() if isinstance(each, dict) and isinstance(each.get("inputs"), dict)
    }
    walk = _Walk(nodes)
    found = [(walk.text(inputs, "positive"), walk.text(inputs, "negative")) for inputs in _samplers(nodes)]
    return list(dict.fromkeys(pair for pair in found if pair[0]))


def _samplers(nodes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The inputs of the samplers whose result reaches a node at the end, such as SaveImage; or else of all."""
    links = {key: {link[0] for link in map(_link, node["inputs"].values()) if link} for key, node in nodes.items()}
    samplers = [key for key, node in nodes.items() if _samples(node["inputs"])]
    waiting = list(nodes.keys() - set().union(*links.values()) - set(samplers))
    reached = set(waiting)
    while waiting:
        waiting += (new := (links.get(waiting.pop(), set()) - reached))
        reached |= new
    return [nodes[key]["inputs"] for key in [key for key in samplers if key in reached] or samplers]


def _samples(inputs: Mapping[str, Any]) -> bool:
    return "guider" in inputs or ("positive" in inputs and not inputs.keys().isdisjoint(("seed", "noise_seed")))


def _link(value: Any) -> tuple[str, int] | None:
    """The node and its output that an input reads; None for a value."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int) and isinstance(value[1], int):
        return str(value[0]), value[1]
    return None


class _Walk:
    """Follows links back from a sampler, within bounds."""

    def __init__(self, nodes: Mapping[str, Any]) -> None:
        self.nodes, self.left = nodes, _WORK

    def text(self, sampler: Mapping[str, Any], side: str) -> str:
        """Return the texts that reach one side of a sampler, each once."""
        inputs = sampler
        if guider := _link(sampler.get("guider")):
            inputs = self._visit(guider[0], ())["inputs"]
            if side == "positive":
                inputs = {"positive": inputs.get("conditioning", inputs.get("cond1")), **inputs}
        texts = (text.strip() for text in self._conditioning(inputs.get(side), ()))
        return ", ".join(dict.fromkeys(filter(None, texts)))

    def _visit(self, key: str, path: tuple[str, ...]) -> dict[str, Any]:
        if key in path or len(path) >= _DEPTH:
            raise ValueError(f"ComfyUI's graph has a cycle, or more than {_DEPTH} nodes in a row")
        self._count(_PER_NODE)
        return self.nodes.get(key, {"inputs": {}})

    def _count(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise ValueError("ComfyUI's graph is too large")

    def _conditioning(self, value: Any, path: tuple[str, ...]) -> Iterator[str]:
        """Yield the texts that are encoded in what an input reads."""
        if (link := _link(value)) is None:
            return
        node, path = self._visit(link[0], path), (*path, link[0])
        inputs: dict[str, Any] = node["inputs"]
        if node.get("class_type") == "ConditioningZeroOut":
            return
        if encoded := [each for name, each in inputs.items() if _ENCODED.fullmatch(name)]:
            yield from (self._string(each, path) for each in encoded)
        elif "positive" in inputs and "ckpt_name" in inputs:  # Efficient Loader, whose first output is a model
            yield self._string(inputs.get("negative" if link[1] == 2 else "positive"), path)
        elif "positive" in inputs and "negative" in inputs:  # such as ControlNetApplyAdvanced, with an output for each
            yield from self._conditioning(inputs["negative" if link[1] == 1 else "positive"], path)
        else:
            named = [each for name, each in inputs.items() if name.startswith("cond")]
            for each in named or [each for name, each in inputs.items() if not _NO_TEXT.fullmatch(name)]:
                yield from self._conditioning(each, path)

    def _string(self, value: Any, path: tuple[str, ...]) -> str:
        """Return a text, or that which the nodes behind a link hold and join."""
        if isinstance(value, str):
            self._count(len(value))
            return value
        if (link := _link(value)) is None:
            return ""
        node, path = self._visit(link[0], path), (*path, link[0])
        given = {name: each for name, each in node["inputs"].items() if isinstance(each, str) or _link(each)}
        parts = [each for name, each in given.items() if _JOINED.fullmatch(name)]
        if str(node.get("class_type")).startswith("ShowText"):  # which also holds a copy of what it has shown
            parts = [each for each in parts if _link(each)] or parts[-1:]
        others = [each for name, each in given.items() if name not in _JOINS and not _JOINED.fullmatch(name)]
        if not parts and len(others) == 1 and _link(others[0]):  # such as a reroute
            return self._string(others[0], path)
        if others or not parts:
            kind = str(node.get("class_type", "that is missing"))[:80]
            raise ValueError(f"the text comes from the node {kind}, whose result the file does not hold")
        joint = next((given[name] for name in _JOINS[:2] if name in given), "")
        text = self._string(joint, path).join(self._string(each, path) for each in parts)
        self._count(len(text))
        return text
