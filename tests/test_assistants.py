from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_transformers import (
    WIDTH,
    tiny_tokenizer,
    write_tiny_blip2,
    write_tiny_llama,
    write_tiny_llava,
    write_tiny_sam,
)
from torch import Tensor, nn
from transformers import AutoProcessor, AutoTokenizer, LlamaForCausalLM, LlavaForConditionalGeneration, SamModel

from aigiqa_reward.assistants import (
    AssistantCache,
    Assistants,
    AttributesConfig,
    CaptionerConfig,
    LLMAttributes,
    LMMCaptioner,
    LMMSemantics,
    SAMSegmenter,
    SegmenterConfig,
    SemanticsConfig,
    grid_regions,
    noun_phrases,
)
from aigiqa_reward.assistants.captioner import DESCRIBE, QUESTIONS

SAID = "A red cube on a green floor."
LISTED = "1. two cats\n2. **red sofa**\n- oil painting\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Any:
    place = tmp_path_factory.mktemp("models")
    return SimpleNamespace(
        llava=write_tiny_llava(place / "llava"),
        says=write_tiny_llava(place / "says", answer=SAID),
        says_plainly=write_tiny_llava(place / "says_plainly", answer=SAID, chat=False),
        blip2=write_tiny_blip2(place / "blip2"),
        llama=write_tiny_llama(place / "llama"),
        lists=write_tiny_llama(place / "lists", answer=LISTED, chat=True),
        sam=write_tiny_sam(place / "sam"),
    )


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(5, 3, 40, 48, generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Kind:
    assistant: Any
    config: Any
    method: str
    model: str
    rows: str
    options: dict[str, int] = field(default_factory=dict)

    def make(self, folders: Any, cache: AssistantCache | None = None, **options: Any) -> Any:
        place = str(getattr(folders, self.model))
        return self.assistant(self.config(path_or_id=place, **self.options | options), cache=cache)

    def ask(self, assistant: Any, images: Tensor) -> Any:
        if self.method == "decompose":  # a text for each image, of unequal lengths
            numbers = [(int(image[0, 0, 0] * 9), float(image.sum())) for image in images.detach()]
            return assistant.decompose([f"a photo of {'very ' * count}{total:.3f} cats" for count, total in numbers])
        return getattr(assistant, self.method)(images)


KINDS = {
    "captioner": Kind(LMMCaptioner, CaptionerConfig, "describe", "llava", "input_ids", {"max_new_tokens": 12}),
    "semantics": Kind(LMMSemantics, SemanticsConfig, "read", "llava", "pixel_values"),
    "segmenter": Kind(SAMSegmenter, SegmenterConfig, "segment", "sam", "image_embeddings", {"points_per_side": 3}),
    "attributes": Kind(LLMAttributes, AttributesConfig, "decompose", "llama", "input_ids", {"max_new_tokens": 6}),
}


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


@contextmanager
def passes(kind: Kind, assistant: Any) -> Iterator[list[int]]:
    seen: list[int] = []

    def note(_module: nn.Module, _args: Any, options: dict[str, Any], _output: Any) -> None:
        rows = options.get(kind.rows)
        if rows is not None and (rows.ndim > 2 or rows.shape[1] > 1):  # not the later words of a generated text
            seen.append(len(rows))

    handle = assistant._model.register_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def same(one: Any, other: Any, tolerance: float = 0) -> bool:
    if isinstance(one, Tensor):
        return torch.allclose(one, other, atol=tolerance, rtol=tolerance)
    return one == other


def test_a_known_row_is_not_asked_again(kind, folders, images, tmp_path):
    assistant = kind.make(folders, AssistantCache(tmp_path))
    with passes(kind, assistant) as seen:
        first = kind.ask(assistant, images[:3])
        assert seen
        seen.clear()
        assert same(kind.ask(assistant, images[:3]), first)
        assert seen == []
    later = kind.make(folders, AssistantCache(tmp_path))  # another session
    assert same(kind.ask(later, images[:3]), first)
    assert not {"_model", "_processor", ""} & vars(later).keys()  # and no weights were loaded


def test_an_answer_depends_on_its_row_alone_and_draws_nothing(kind, folders, images):
    one, two = kind.make(folders, batch_size=1), kind.make(folders, batch_size=2)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    alone = [kind.ask(one, image[None]) for image in images]
    assert torch.equal(torch.get_rng_state(), state)
    for row, answer in enumerate(kind.ask(two, images)):
        assert same(answer, alone[row][0], 1e-5)


def test_no_gradient_is_kept(kind, folders, images):
    assistant = kind.make(folders)
    pixels = images[:2].clone().requires_grad_()
    recording: list[bool] = []
    assistant._model.register_forward_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    answer = kind.ask(assistant, pixels)
    assert not isinstance(answer, Tensor) or not answer.requires_grad
    assert set(recording) == {False}
    assert not any(weight.requires_grad for weight in assistant._model.parameters())
    assert not assistant._model.training


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_work(kind, folders, images, dtype):
    assistant = kind.make(folders, dtype=dtype)
    answer = kind.ask(assistant, images[:2])
    assert {weight.dtype for weight in assistant._model.parameters()} == {dtype}
    assert not isinstance(answer, Tensor) or (answer.dtype == torch.float32 and bool(torch.isfinite(answer).all()))


SETTINGS = {
    "captioner": {"question": "What is this?", "max_new_tokens": 5},
    "semantics": {},
    "segmenter": {"max_regions": 3, "points_per_side": 2, "max_overlap": 0.5},
    "attributes": {"limit": 3, "max_new_tokens": 5},
}


@pytest.mark.parametrize("name", KINDS)
def test_identity_changes_with_everything_that_changes_the_answer(folders, name):
    base = KINDS[name].make(folders)
    changes = {"revision": "main", "dtype": torch.bfloat16, "path_or_id": str(folders.blip2), **SETTINGS[name]}
    others = [type(base)(replace(base.config, **{field: value})) for field, value in changes.items()]
    identities = [base.identity, *(other.identity for other in others)]
    assert len(set(identities)) == len(identities)
    assert type(base)(replace(base.config, device="cuda:1", batch_size=3)).identity == base.identity
    assert json.loads(base.identity).items() >= {"kind": base.kind, **json.loads(json.dumps(base.recipe))}.items()


def test_a_folder_is_one_model_by_any_name_until_it_is_trained_further(folders, images, tmp_path, monkeypatch):
    folder = shutil.copytree(folders.llava, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    named = LMMSemantics(SemanticsConfig(path_or_id="model"))
    assert named.identity == LMMSemantics(SemanticsConfig(path_or_id=str(folder))).identity
    cache = AssistantCache(tmp_path / "cache")
    before = LMMSemantics(SemanticsConfig(path_or_id=str(folder)), cache=cache)
    features = before.read(images[:1])
    write_tiny_llava(folder, seed=1)
    after = LMMSemantics(SemanticsConfig(path_or_id=str(folder)), cache=cache)
    assert after.identity != before.identity
    assert not torch.equal(after.read(images[:1]), features)
    assert torch.equal(before.read(images[:1]), features)


def test_a_description_is_the_models_answer_alone_with_or_without_a_chat_template(folders, images):
    for folder in (folders.says, folders.says_plainly):
        assert LMMCaptioner(CaptionerConfig(path_or_id=str(folder))).describe(images[:2]) == [SAID, SAID]


def greedy(model: Any, inputs: dict[str, Tensor], count: int) -> list[int]:
    tokens, said = inputs["input_ids"], []
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        for _ in range(count):
            following = model(input_ids=tokens, use_cache=False, **rest).logits[:, -1].argmax(dim=-1)
            tokens = torch.cat([tokens, following[:, None]], dim=1)
            said.append(int(following))
    return said


def test_a_description_is_the_greedy_answer_to_the_question(folders, images, tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(folders.llava)
    processor = AutoProcessor.from_pretrained(folders.llava)
    described = LMMCaptioner(CaptionerConfig(path_or_id=str(folders.llava), max_new_tokens=6)).describe(images)
    for image, text in zip(images, described, strict=True):
        picture = picture_of(image)
        prompt = f"USER: <image>\n{DESCRIBE} ASSISTANT:"
        inputs = processor(text=prompt, images=picture, return_tensors="pt")
        assert processor.tokenizer.decode(greedy(model, inputs, 6)) == text
    other = CaptionerConfig(path_or_id=str(folders.llava), max_new_tokens=6, question="Which colors are there?")
    assert LMMCaptioner(other).describe(images) != described
    folder = shutil.copytree(folders.llava, tmp_path / "model")  # a model that is set to sample
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "top_k": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    sampling = CaptionerConfig(path_or_id=str(folder), max_new_tokens=6)
    assert LMMCaptioner(sampling).describe(images[:2]) == described[:2]


def test_a_model_that_places_image_tokens_itself_is_asked_but_not_for_hidden_layers(folders, images):
    captioner = LMMCaptioner(CaptionerConfig(path_or_id=str(folders.blip2), max_new_tokens=3))
    assert len(captioner.describe(images[:2])) == 2
    with pytest.raises(ValueError, match=r"path_or_id: .*Blip2.*hidden layer.*pass a decoder-only"):
        LMMSemantics(SemanticsConfig(path_or_id=str(folders.blip2))).read(images[:1])


def test_features_are_the_mean_of_the_last_hidden_layer_under_each_question(folders, images):
    model = LlavaForConditionalGeneration.from_pretrained(folders.llava)
    processor = AutoProcessor.from_pretrained(folders.llava)
    assert LMMSemantics(SemanticsConfig(path_or_id=str(folders.llava))).width == WIDTH
    read = LMMSemantics(SemanticsConfig(path_or_id=str(folders.llava), batch_size=2)).read(images)
    assert read.shape == (5, 2, WIDTH)
    exact, reader = (images[:1] * 255).round() / 256, LMMSemantics(SemanticsConfig(path_or_id=str(folders.llava)))
    assert torch.equal(reader.read(exact.bfloat16()), reader.read(exact)), "an image of any precision is read alike"
    for image, features in zip(images, read, strict=True):
        picture = picture_of(image)
        for question, feature in zip(QUESTIONS, features, strict=True):
            inputs = processor(text=f"USER: <image>\n{question} ASSISTANT:", images=picture, return_tensors="pt")
            with torch.no_grad():
                states = model.model(**inputs).last_hidden_state[0]
            torch.testing.assert_close(feature, states.mean(dim=0), atol=1e-5, rtol=1e-4)


def test_padding_is_left_out_of_the_mean(folders, images):
    reader = LMMSemantics(SemanticsConfig(path_or_id=str(folders.llava)))
    short, long = (reader._inputs(images[:1], question) for question in ("Why?", "What is the matter here?"))
    room = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    padded = {"pixel_values": short["pixel_values"]}
    padded["input_ids"] = nn.functional.pad(short["input_ids"], (room, 0), value=tiny_tokenizer().eos_token_id)
    padded["attention_mask"] = nn.functional.pad(short["attention_mask"], (room, 0))
    with torch.no_grad():
        torch.testing.assert_close(reader._features(padded), reader._features(short), atol=1e-5, rtol=1e-4)


def picture_of(image: Tensor) -> Image.Image:
    return Image.fromarray(np.round(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8))


def suppressed(masks: np.ndarray, scores: np.ndarray, count: int, most: float) -> list[int]:
    cells = [set(np.flatnonzero(mask)) for mask in masks]
    kept: list[int] = []
    for index in sorted(range(len(masks)), key=lambda i: (-scores[i], i)):
        clear = all(len(cells[index] & cells[k]) <= most * len(cells[index] | cells[k]) for k in kept)
        if cells[index] and clear and len(kept) < count:
            kept.append(index)
    return kept


@pytest.mark.parametrize("size", [(32, 64), (96, 48)], ids=str)
def test_regions_are_sams_best_distinct_masks_of_the_image_without_its_padding(folders, size):
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    config = SegmenterConfig(path_or_id=str(folders.sam), points_per_side=5, max_overlap=0.8)
    found = SAMSegmenter(config).segment(image)[0].numpy()

    model, processor = SamModel.from_pretrained(folders.sam), AutoProcessor.from_pretrained(folders.sam)
    picture = picture_of(image[0])
    height, width = size
    points = [[[(x + 0.5) * width / 5, (y + 0.5) * height / 5]] for y in range(5) for x in range(5)]
    with torch.no_grad():
        output = model(**processor(images=picture, input_points=[points], return_tensors="pt").to(torch.float32))
    scores = output.iou_scores[0].numpy()
    shown = [round(16 * side / max(size)) for side in size]  # masks are 16 x 16 over the padded square
    masks = [output.pred_masks[0, i, j, : shown[0], : shown[1]] for i, j in enumerate(scores.argmax(axis=1))]
    pillow = [Image.fromarray(mask.numpy()).resize((64, 64), Image.Resampling.BILINEAR) for mask in masks]
    resized = np.stack([np.asarray(mask) for mask in pillow])
    kept = suppressed(resized > 0, scores.max(axis=1), 16, 0.8)
    assert 1 < len(kept) < 25
    np.testing.assert_allclose(found[: len(kept)], 1 / (1 + np.exp(-resized[kept])), atol=1e-4)
    assert not found[len(kept) :].any()


@pytest.mark.parametrize(("rows", "columns", "size"), [(4, 4, 64), (3, 5, 64), (7, 7, 7)])
def test_a_grid_covers_the_image_once(rows, columns, size):
    with pytest.raises(ValueError, match=r"rows: expected"):
        grid_regions(size + 1, columns, size)
    regions = grid_regions(rows, columns, size)
    assert regions.shape == (rows * columns, size, size)
    assert torch.equal(regions.sum(dim=0), torch.ones(size, size))
    for (row, column), region in zip(np.ndindex(rows, columns), regions, strict=True):  # in reading order
        y, x = (axis.float().mean() / size for axis in torch.nonzero(region, as_tuple=True))
        assert row / rows <= y <= (row + 1) / rows and column / columns <= x <= (column + 1) / columns


def test_attributes_are_those_the_model_lists(folders):
    reader = LLMAttributes(AttributesConfig(path_or_id=str(folders.lists)))
    assert reader.decompose(["cats", "a sofa"]) == [["two cats", "red sofa", "oil painting"]] * 2
    assert LLMAttributes(replace(reader.config, limit=2)).decompose(["cats"]) == [["two cats", "red sofa"]]
    assert reader.decompose([]) == []


@pytest.mark.parametrize("model", ["llama", "lists"])
def test_the_prompt_is_put_as_the_model_expects(folders, model):
    folder = getattr(folders, model)
    reader = LLMAttributes(AttributesConfig(path_or_id=str(folder), max_new_tokens=5))
    network, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked: list[Tensor] = []
    reader._model.register_forward_pre_hook(
        lambda _module, _args, options: asked.append(options["input_ids"]), with_kwargs=True
    )
    [answer] = reader._ask(["two\n cats"])
    [prompt] = asked[0]
    assert prompt.tolist().count(tokenizer.bos_token_id) == 1
    shown = tokenizer.decode(prompt, skip_special_tokens=True)
    assert "Prompt: two cats\nPhrases:" in shown
    assert shown.startswith("[USER] List") == (model == "lists")
    expected = tokenizer.decode(greedy(network, {"input_ids": prompt[None]}, 5), skip_special_tokens=True)
    assert expected.startswith(answer if model == "llama" else LISTED)


def test_an_answer_that_is_no_list_falls_back_to_noun_phrases(folders, tmp_path):
    write_tiny_llama(tmp_path / "chats", answer="I am sorry, but there is nothing here that I could possibly list!")
    texts = ["two cats on a red sofa", "a dog"]
    reader = LLMAttributes(AttributesConfig(path_or_id=str(tmp_path / "chats")), cache=AssistantCache(tmp_path / "c"))
    for _ in range(2):  # the warning comes again with answers from the cache
        with pytest.warns(UserWarning, match=r"no list of phrases for 2 of 2 prompts \(first: 'two cats"):
            assert reader.decompose(texts) == [noun_phrases(text) for text in texts]


@pytest.mark.parametrize("name", ["captioner", "semantics", "segmenter"])
def test_what_is_no_input_is_refused_before_a_model_is_loaded(name):
    assistant = KINDS[name].make(SimpleNamespace(llava="nowhere", sam="nowhere"))
    with pytest.raises(ValueError, match=r"images: .*values in \[0, 1\]"):
        KINDS[name].ask(assistant, torch.full((1, 3, 32, 32), 255.0))
    for texts in ("a cat", [1, 2]):
        with pytest.raises(TypeError, match=r"texts: expected a list of prompts, got .*pass \[prompt\]"):
            LLMAttributes(AttributesConfig(path_or_id="nowhere")).decompose(texts)


def describe(folder: Path | str, images: Tensor, **options: Any) -> list[str]:
    return LMMCaptioner(CaptionerConfig(path_or_id=str(folder), max_new_tokens=2, **options)).describe(images[:1])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def headless(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "could not be loaded.*with config.json"),
    "pickles": (pickled, "could not be loaded.*model.safetensors.*pickles are never opened"),
    "missing weights": (headless, r"lacks 1 weights .*lm_head.weight.*would be random"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_cannot_be_loaded_says_why(folders, images, tmp_path, name):
    damage, message = BROKEN[name]
    damage(folder := shutil.copytree(folders.llava, tmp_path / "model"))
    with pytest.raises(ValueError, match=f"(?s)path_or_id: .*{message}"):
        describe(folder, images)


def test_a_repositorys_own_code_is_never_run(folders, images, tmp_path):
    folder = shutil.copytree(folders.llava, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.C", "AutoModelForImageTextToText": "code.M"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"path_or_id: .*custom code"):
        describe(folder, images)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("captioner", "llama", "'llama' model, not an image-text-to-text model"),
        ("semantics", "sam", "'sam' model, not an image-text-to-text model"),
        ("segmenter", "llava", "'llava' model, not a Segment Anything model.*sam-vit-base"),
        ("attributes", "sam", "'sam' model, not a causal language model"),
    ],
)
def test_a_model_of_another_kind_is_refused(folders, images, name, model, message):
    kind, place = KINDS[name], getattr(folders, model)
    assistant = kind.make(SimpleNamespace(llava=place, sam=place, llama=place))
    with pytest.raises(ValueError, match=f"path_or_id: .*{message}"):
        kind.ask(assistant, images[:1])


def test_a_name_that_the_hub_cannot_give_and_a_device_that_is_not_there_are_named(folders, images, monkeypatch):
    with pytest.raises(ValueError, match="device: 'cuda:77' is not available here; pass device='cpu'"):
        describe(folders.llava, images, device="cuda:77")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"path_or_id: 'nobody/nothing' could not be loaded.*check the revision"):
        describe("nobody/nothing", images)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CaptionerConfig, {"path_or_id": "weights.pt"}, "path_or_id: .*pickled checkpoints are never opened"),
        (CaptionerConfig, {"dtype": torch.int8}, "dtype: expected a floating torch.dtype"),
        (SemanticsConfig, {"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        (AttributesConfig, {"max_new_tokens": 1.5}, "max_new_tokens: expected an integer of at least 1"),
        (SegmenterConfig, {"max_overlap": 1.1}, r"max_overlap: expected .* in \[0, 1\], got 1.1"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(config, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        config(**{"path_or_id": "some/model", **options})


def test_an_assistant_in_another_role_is_refused(folders):
    captioner = KINDS["captioner"].make(folders)
    with pytest.raises(TypeError, match=r"segmenter: expected an assistant with a method segment\(\).*LMMCaptioner"):
        Assistants(segmenter=captioner)
    with pytest.raises(TypeError, match=r"captioner: expected .*got the class LMMCaptioner"):
        Assistants(captioner=LMMCaptioner)
