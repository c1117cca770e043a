"""Perceptual distances: by the features of CLIP, and LPIPS from a file of its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from unclip.errors import CheckpointError, ConfigError
from unclip.models.clip import Clip
from unclip.models.perceptual import ClipDistance, LpipsDistance

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
"""Widths of the convolutions, and halvings of the resolution. Source: Simonyan & Zisserman 2015, Table 1, D."""


def images(seed: int, size: int = 64) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def clip() -> Clip:
    torch.manual_seed(0)
    return Clip.load("unclip-demo")


def test_distances_of_clip_are_zero_for_equal_images_and_grow_with_the_difference(clip: Clip) -> None:
    distance = ClipDistance(clip.model)
    assert len(distance.layers) == 4
    near, far = images(0) * 0.99, images(1)
    assert distance(images(0), images(0)).tolist() == [0, 0]
    assert (distance(near, images(0)) > 0).all() and (distance(near, images(0)) < distance(far, images(0)) / 5).all()


def test_distances_of_clip_have_gradients_in_images_and_none_in_weights(clip: Clip) -> None:
    leaf = images(0).requires_grad_()
    ClipDistance(clip.model)(leaf, images(1)).sum().backward()
    assert leaf.grad is not None and (leaf.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in clip.parameters())


def test_distances_are_those_of_unit_features(clip: Clip) -> None:
    """Oracle: the stages of the image encoder, one after the other, in float64."""
    visual: Any = clip.model.visual
    features = []
    for batch in (images(0), images(1)):
        x, found = visual.stem(clip.resize(batch)), []
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = layer(x)
            found.append(F.normalize(x.double(), dim=1))
        features.append(found)
    terms = [(one - other).square().sum(dim=1).mean(dim=(1, 2)) for one, other in zip(*features, strict=True)]
    torch.testing.assert_close(ClipDistance(clip.model)(images(0), images(1)).double(), torch.stack(terms).mean(dim=0))


def test_an_image_encoder_without_known_layers_is_refused(clip: Clip) -> None:
    class Other:
        visual = torch.nn.Identity()

    with pytest.raises(ConfigError, match="image encoder Identity has no layers"):
        ClipDistance(Other())


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lpips(tmp_path_factory.mktemp("lpips") / "vgg.safetensors")


def write_lpips(path: Path, seed: int = 0) -> Path:
    """Write random weights under the names of the package lpips."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    width, number, part = 3, 0, 1
    for entry in VGG16:
        if entry == "M":
            part, number = part + 1, number + 1
            continue
        size = int(entry)
        tensors[f"net.slice{part}.{number}.weight"] = (
            torch.randn(size, width, 3, 3, generator=generator) * (2 / 9 / width) ** 0.5
        )
        tensors[f"net.slice{part}.{number}.bias"] = torch.randn(size, generator=generator) * 0.1
        width, number = size, number + 2
    for layer, size in enumerate((64, 128, 256, 512, 512)):
        tensors[f"lin{layer}.model.1.weight"] = torch.rand(1, size, 1, 1, generator=generator)
    save_file(tensors, path)
    return path


def test_lpips_is_that_of_its_definition(lpips_file: Path) -> None:
    """Oracle: the network written out, in float64. Source: Zhang et al. 2018, eq. 1."""
    from safetensors.torch import load_file

    tensors = {name: value.double() for name, value in load_file(lpips_file).items()}
    shift, scale = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
    )

    def features(x: torch.Tensor) -> list[torch.Tensor]:
        x, found, number, part = (x.double() - shift) / scale, [], 0, 1
        for entry in (*VGG16, "M"):
            if entry == "M":
                found.append(F.normalize(x, dim=1))
                x, part, number = F.max_pool2d(x, 2), part + 1, number + 1
            else:
                name = f"net.slice{part}.{number}"
                x, number = (
                    F.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], padding=1).relu(),
                    number + 2,
                )
        return found

    expected = sum(
        F.conv2d((one - other).square(), tensors[f"lin{layer}.model.1.weight"]).mean(dim=(1, 2, 3))
        for layer, (one, other) in enumerate(zip(features(images(0)), features(images(1)), strict=True))
    )
    distance = LpipsDistance.load(lpips_file).to(torch.device("cpu"))
    found = distance(images(0), images(1))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
    assert distance(images(0), images(0)).tolist() == [0, 0]
    leaf = images(0, 32).requires_grad_()
    distance(leaf, images(1, 32)).sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0


def test_files_that_are_no_lpips_are_refused(tmp_path: Path, lpips_file: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        LpipsDistance.load(path)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(CheckpointError, match="pickles are not read"):
        LpipsDistance.load(path)
    save_file({"net.slice1.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(CheckpointError, match="has no LPIPS of VGG16"):
        LpipsDistance.load(path)
