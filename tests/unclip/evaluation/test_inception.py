"""Inception: its preparation of images, its pools, and the weights that it accepts."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unclip import files, imaging
from unclip.errors import InputError
from unclip.evaluation import inception
from unclip.evaluation.inception import build, load_inception, prepare


@pytest.mark.parametrize("size", [64, 299, 512])
def test_images_are_resized_as_tensorflow_did(size: int) -> None:
    """Oracle: its formula for one pixel at a time; the values of the grid are those of 8 bits."""
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = prepare(images)[0]
    pixels = torch.from_numpy(imaging.to_uint8(images)[0]).permute(2, 0, 1).double()
    assert found.shape == (3, 299, 299)
    for y, x in ((0, 0), (7, 150), (298, 298), (150, 3)):
        top, left = y * size / 299, x * size / 299
        rows = int(top), min(int(top) + 1, size - 1)
        columns = int(left), min(int(left) + 1, size - 1)
        above, below = (
            pixels[:, row, columns[0]] * (1 - left % 1) + pixels[:, row, columns[1]] * (left % 1) for row in rows
        )
        expected = (above * (1 - top % 1) + below * (top % 1) - 128) / 128
        assert found[:, y, x].double() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_pools_leave_out_what_is_around_the_image_and_the_last_takes_the_maximum() -> None:
    """Oracle: torch's own pools with the right options, before the same convolution."""
    torch.manual_seed(0)
    model = build().eval()
    seen: dict[str, torch.Tensor] = {}
    for name in ("Mixed_5b", "Mixed_6c", "Mixed_7b", "Mixed_7c"):
        block = getattr(model, name)
        block.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0]))
        block.branch_pool.register_forward_hook(
            lambda _, __, output, name=name: seen.__setitem__(f"{name} pool", output)
        )
    model(torch.randn(1, 3, 299, 299))
    for name in ("Mixed_5b", "Mixed_6c", "Mixed_7b", "Mixed_7c"):
        given, convolution = seen[name], getattr(model, name).branch_pool
        is_last = name == "Mixed_7c"
        pooled = F.max_pool2d(given, 3, 1, 1) if is_last else F.avg_pool2d(given, 3, 1, 1, count_include_pad=False)
        expected = F.relu(convolution.bn(convolution.conv(pooled)))
        assert torch.allclose(seen[f"{name} pool"], expected, rtol=1e-4, atol=1e-5), name


@torch.no_grad()
def test_weights_are_loaded_and_give_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    original = build()
    path = str(tmp_path / "weights.pth")
    released = {name: value for name, value in original.state_dict().items() if "num_batches" not in name}
    torch.save(released, path)  # as old as the released file, which lacks these counts
    with pytest.raises(InputError, match="expected 6726825d"):
        load_inception(path)
    monkeypatch.setattr(inception, "DIGEST", files.digest(path))
    loaded = load_inception(path)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    features = loaded(prepare(images))
    assert features.shape == (2, inception.WIDTH) and not loaded.training
    logits = original.eval()(prepare(images))
    assert torch.allclose(F.linear(features, original.fc.weight, original.fc.bias), logits, rtol=1e-4, atol=1e-5)


def test_files_that_are_no_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle that would run code is not unpickled, whatever its digest."""
    path = tmp_path / "weights.pth"
    marker = tmp_path / "ran"

    class Hostile(nn.Module):
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (marker,)

    torch.save({"fc.weight": Hostile()}, path)
    with pytest.raises(InputError, match="expected 6726825d"):
        load_inception(str(path))
    monkeypatch.setattr(inception, "DIGEST", files.digest(str(path)))
    with pytest.raises(InputError, match="holds no weights of Inception"):
        load_inception(str(path))
    assert not marker.exists()
    with pytest.raises(InputError, match="cannot be read"):
        load_inception(str(tmp_path / "missing.pth"))
    monkeypatch.setattr(inception, "MAX_BYTES", 10)
    with pytest.raises(InputError, match=r"a file of .* bytes"):
        load_inception(str(path))
