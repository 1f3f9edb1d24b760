"""The node pack in a real ComfyUI on the CPU: COMFYUI_PATH names its checkout, COMFYUI_PYTHON its Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from comfyui_pack import DRAWN, PACK, load_pack, read_workflow
from comfyui_server import ComfyUI, comfyui
from PIL import Image
from prompt_files import POSITIVE, graph
from prompt_files import node as comfyui_node

from aigiqa_reward import Scorer, create_reward
from aigiqa_reward.images import read_prompt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "COMFYUI_PATH" not in os.environ,
        reason="COMFYUI_PATH is not set to a checkout of ComfyUI whose requirements COMFYUI_PYTHON has",
    ),
]
ROOT = PACK.parents[1]
PROMPT = "a tray of sushi"
SIDE = 256
API = PACK / "example_workflows" / "api"
READY = "Boolean(window.app?.graph && window.LiteGraph?.registered_node_types?.AIGIQAScore)"
DROP = """([text, name]) => {
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([text], name, {type: "application/json"}));
  document.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    base = tmp_path_factory.mktemp("comfyui")
    shutil.copytree(PACK, base / "custom_nodes" / "aigiqa-reward")
    with comfyui(base, [ROOT]) as running:
        yield running


@pytest.fixture(scope="module")
def pictures(server: ComfyUI) -> dict[str, np.ndarray]:
    found = {}
    for name, generator in {"first": "glide_normal", "second": "sd15_lowstep", "third": "AttnGAN_normal"}.items():
        with Image.open(ROOT / "examples" / "images" / f"sushi_{generator}.jpg") as file:
            small = file.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        small.save(server.base / "input" / f"{name}.png")
        found[f"{name}.png"] = np.asarray(small)
    return found


def test_it_loads_and_declares_its_nodes_and_the_second_workflow_lacks_nothing_but_a_checkpoint(server):
    nodes = load_pack().NODE_CLASS_MAPPINGS
    described = server.request("/object_info")
    assert "IMPORT FAILED" not in server.log.read_text()
    for name, node in nodes.items():
        assert described[name]["input"] == json.loads(json.dumps(node.INPUT_TYPES()))
        assert described[name]["output"] == list(node.RETURN_TYPES)
        assert described[name]["output_tooltips"] == list(node.OUTPUT_TOOLTIPS)
        assert described[name]["category"] == "AIGIQA"
    answer = server.request("/prompt", {"prompt": read_workflow(API / "best_of_batch.json")})
    [fault] = [error for node in answer["node_errors"].values() for error in node["errors"]]
    assert (fault["type"], fault["extra_info"]["input_name"]) == ("value_not_in_list", "ckpt_name")


@pytest.mark.parametrize("way", POSITIVE)
def test_the_prompt_that_save_image_writes_is_read(server, pictures, way):
    workflow = graph(*POSITIVE[way]("a (red:1.2) fox in the snow"))
    workflow["30"] = comfyui_node("LoadImage", image="first.png")
    workflow["9"]["inputs"]["images"] = ["30", 0]  # there is no checkpoint to sample with; all nodes are written
    [file] = server.saved(server.run(workflow))
    found = read_prompt(file)
    assert found is not None
    assert (found.text, found.negative) == ("a red fox in the snow", "text, watermark")


def test_the_best_of_several_images_is_saved(server, pictures):
    workflow = read_workflow(API / "rank_images.json")
    entry = server.run(workflow)
    assert entry["status"]["status_str"] == "success", entry["status"]
    [file] = server.saved(entry)
    totals = Scorer(create_reward("compact")).score(list(pictures.values()), PROMPT).total
    best = list(pictures)[int(totals.argmax())]
    assert best == "second.png"
    with Image.open(file) as saved:
        assert np.array_equal(np.asarray(saved.convert("RGB")), pictures[best])
    [text] = [output["text"][0] for output in entry["outputs"].values() if "text" in output]
    assert [row["total"] for row in json.loads(text)] == pytest.approx(totals.tolist(), abs=1e-4)
    shown = [image for output in entry["outputs"].values() for image in output.get("images", [])]
    assert len(shown) == 1 + len(pictures)  # the saved one, and a heat map of each


@pytest.fixture(scope="module")
def page(server: ComfyUI) -> Iterator[Any]:
    browser = pytest.importorskip("playwright.sync_api", reason="playwright, which drives a browser, is not installed")
    if (chromium := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        pytest.skip("no chromium on PATH")
    with (
        browser.sync_playwright() as driver,
        driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as it,
    ):
        page = it.new_page()
        page.goto(server.address)
        page.wait_for_function(f"() => {READY}", timeout=300_000)
        yield page


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.stem)
def test_a_workflow_dropped_into_the_front_end_is_the_one_that_runs(server, page, pictures, path):
    templates = server.request("/api/workflow_templates")
    assert sorted(templates["aigiqa-reward"]) == [drawn.stem for drawn in DRAWN]
    drawn, expected = read_workflow(path), read_workflow(API / path.name)
    page.evaluate(DROP, [path.read_text(), path.name])
    page.wait_for_function(f"() => app.graph.nodes.length === {len(drawn['nodes'])}", timeout=60_000)
    shown = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert shown.keys() == expected.keys()
    for place, node in expected.items():
        assert (shown[place]["class_type"], shown[place]["_meta"]) == (node["class_type"], node["_meta"])
        assert shown[place]["inputs"] | node["inputs"] == shown[place]["inputs"]
    places = page.evaluate("() => Object.fromEntries(app.graph.nodes.map(node => [node.id, [...node.pos]]))")
    assert places == {str(node["id"]): node["pos"] for node in drawn["nodes"]}
    if path.stem == "rank_images":
        assert server.run(shown)["status"]["status_str"] == "success"


@pytest.mark.parametrize("if_none", ["error", "stop"])
def test_where_no_image_passes_nothing_is_saved(server, pictures, if_none):
    workflow = read_workflow(API / "rank_images.json")
    inputs = {node["class_type"]: node["inputs"] for node in workflow.values()}
    inputs["AIGIQAFilter"] |= {"threshold": 5.0, "if_none": if_none}
    inputs["AIGIQAScore"]["heat_map"] = "off"
    entry = server.run(workflow)
    assert not server.saved(entry)
    if if_none == "error":
        assert entry["status"]["status_str"] == "error"
        errors = [content for kind, content in entry["status"]["messages"] if kind.endswith("error")]
        assert "no image passes: the best quality is 0." in errors[0]["exception_message"]
    else:
        assert entry["status"]["status_str"] == "success", entry["status"]
        assert any("text" in output for output in entry["outputs"].values())


def test_installed_by_pip_it_needs_one_file_in_custom_nodes(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling, which builds the pack, is not installed")
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    built = subprocess.run([sys.executable, "-c", build], capture_output=True, text=True, check=True, cwd=PACK)
    with zipfile.ZipFile(tmp_path / built.stdout.split()[-1]) as wheel:
        wheel.extractall(tmp_path / "installed")
    [lines] = [
        block.split("```")[0]
        for block in (PACK / "README.md").read_text().split("```python\n")
        if "from aigiqa_reward_nodes import" in block
    ]
    (tmp_path / "base" / "custom_nodes").mkdir(parents=True)
    (tmp_path / "base" / "custom_nodes" / "aigiqa.py").write_text(lines.strip())
    with comfyui(tmp_path / "base", [tmp_path / "installed", ROOT]) as server:
        described = server.request("/object_info")
    assert set(load_pack().NODE_CLASS_MAPPINGS) <= described.keys()
