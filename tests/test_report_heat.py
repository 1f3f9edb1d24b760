import matplotlib
import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter
from torch import Tensor, nn

from aigiqa_reward import RewardOutput
from aigiqa_reward.images import letterbox, unletterbox
from aigiqa_reward.report import HeatMaps, draw_heat_maps, heat_maps


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class Weighted(nn.Module):
    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights, requires_grad=False)

    def forward(self, images: Tensor, prompts: list[str] | None) -> Tensor:
        return (images * self.weights).sum(dim=(1, 2, 3)) * (1 if prompts is None else len(prompts[0]))


def brightest(images: Tensor, prompts: list[str] | None) -> RewardOutput:
    seen = letterbox(images, max(images.shape[2:]), fill=torch.full((3,), 0.5))[:, :1]
    total = images.mean(dim=(1, 2, 3))
    return RewardOutput(
        total=total, quality=total, details={"distortion_maps": torch.cat([torch.zeros_like(seen), seen], dim=1)}
    )


def test_unletterbox_undoes_letterbox_and_lays_coarse_maps_where_they_belong():
    images = random_images(2, 3, 33, 20)
    assert torch.equal(unletterbox(letterbox(images, 33, fill=torch.ones(3)), (33, 20)), images)
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 1, 3] = 1  # of a 40 x 80 image in an 80 x 80 square: its right upper part
    found = unletterbox(maps, (40, 80))[0, 0]
    assert found.shape == (40, 80)
    assert divmod(int(found.argmax()), 80)[0] < 20 <= 60 <= divmod(int(found.argmax()), 80)[1]


@pytest.mark.parametrize("inference", [False, True])
def test_a_gradient_map_is_the_gradients_length_in_a_small_window(inference):
    weights = torch.randn(1, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(inference):  # as ComfyUI runs its nodes
        images = random_images(2, 3, 24, 40)
        reward = Weighted(weights)
        if inference:
            with pytest.raises(ValueError, match=r"made within torch\.inference_mode"):
                heat_maps(Weighted(weights.clone()), images)
            with torch.inference_mode(False):
                reward = Weighted(weights.clone())
        heat = heat_maps(reward, images, "lamp")
    length = np.linalg.norm(weights[0].numpy(), axis=0)
    inside = uniform_filter(np.ones_like(length), 3, mode="constant")
    even = uniform_filter(length, 3, mode="constant") / inside
    assert heat.kind == "gradient"
    assert heat.maps.shape == (2, 24, 40)
    assert not heat.maps.is_inference() or inference
    for found in heat.maps:
        np.testing.assert_allclose(found.numpy(), even / even.max(), atol=1e-5)


def test_distortion_maps_lie_over_the_image_and_take_the_highest():
    images = random_images(2, 3, 20, 36)
    heat = heat_maps(brightest, images)
    assert heat.kind == "distortion"
    assert torch.equal(heat.maps, images[:, 0])
    together = heat_maps(brightest, images, ["a", "b"], kind="gradient")
    assert together.kind == "gradient"
    assert torch.equal(heat_maps(brightest, images[1:], ["b"], kind="gradient").maps[0], together.maps[1])


@pytest.mark.parametrize(
    ("reward", "arguments", "message"),
    [
        (brightest, {"kind": "depth"}, "kind: expected one of auto, distortion, gradient, got 'depth'"),
        (Weighted(torch.ones(1)), {"kind": "distortion"}, "no distortion maps.*kind='gradient'"),
        (Weighted(torch.zeros(1)), {}, "the gradient of this reward is 0"),
        (lambda images, _: images.detach().mean((1, 2, 3)), {}, "no gradient passes through this reward"),
    ],
)
def test_what_cannot_be_drawn_is_refused(reward, arguments, message):
    with pytest.raises(ValueError, match=message):
        heat_maps(reward, random_images(2, 3, 16, 16), **arguments)


def test_colors_are_magmas_over_gray():
    images = random_images(1, 3, 16, 16)
    values = torch.linspace(0, 1, 256).view(1, 16, 16)
    heat = HeatMaps(kind="gradient", maps=values)
    colors = torch.from_numpy(matplotlib.colormaps["magma"](values[0].numpy())[..., :3]).permute(2, 0, 1).float()
    full = draw_heat_maps(images, heat, opacity=1)[0]
    torch.testing.assert_close(full, colors, atol=0.02, rtol=0)
    none = draw_heat_maps(images, heat, opacity=0)[0]
    torch.testing.assert_close(none, images[0].mean(dim=0).expand(3, -1, -1))
    torch.testing.assert_close(draw_heat_maps(images, heat, opacity=0.25)[0], 0.75 * none + 0.25 * full)


def test_maps_of_other_images_are_refused():
    heat = HeatMaps(kind="gradient", maps=torch.zeros(1, 16, 16))
    with pytest.raises(ValueError, match=r"images: expected \(1, 3, 16, 16\)"):
        draw_heat_maps(torch.zeros(2, 3, 16, 16), heat)
    with pytest.raises(ValueError, match="opacity: expected a number in"):
        draw_heat_maps(torch.zeros(1, 3, 16, 16), heat, opacity=1.5)
