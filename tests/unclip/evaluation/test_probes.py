from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unclip.errors import InputError, ShapeError
from unclip.evaluation.probes import load_probe


def test_a_linear_probe_applies_its_weight_and_bias(tmp_path: Path) -> None:
    weight, bias = torch.randn(1, 8), torch.randn(1)
    save_file({"weight": weight, "bias": bias}, tmp_path / "linear.safetensors")
    embeddings = torch.randn(5, 8)
    scores = load_probe(str(tmp_path / "linear.safetensors"))(embeddings)
    assert torch.allclose(scores, (embeddings @ weight.T + bias).squeeze(1), atol=1e-6)


def test_an_mlp_applies_its_layers_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    layers = {number: torch.nn.Linear(*shape) for number, shape in ((0, (8, 6)), (2, (6, 4)), (10, (4, 1)))}
    tensors = {
        f"layers.{number}.{name}": value
        for number, layer in layers.items()
        for name, value in layer.state_dict().items()
    }
    embeddings = torch.randn(5, 8)
    for activation, function in (("none", torch.nn.Identity()), ("relu", torch.nn.ReLU())):
        path = tmp_path / f"{activation}.safetensors"
        save_file(tensors, path, metadata={"activation": activation, "output": "sigmoid"})
        expected = layers[10](function(layers[2](function(layers[0](embeddings))))).sigmoid().squeeze(1)
        assert torch.allclose(load_probe(str(path))(embeddings), expected, atol=1e-6)


def test_two_outputs_give_the_probability_of_the_second(tmp_path: Path) -> None:
    weight = torch.randn(2, 8)
    save_file({"0.weight": weight}, tmp_path / "two.safetensors")
    embeddings = torch.randn(5, 8)
    scores = load_probe(str(tmp_path / "two.safetensors"))(embeddings)
    assert torch.allclose(scores, (embeddings @ weight.T).softmax(1)[:, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"0.weight": torch.zeros(3, 8)}, {}, "do not chain"),
        ({"0.weight": torch.zeros(4, 8), "1.weight": torch.zeros(1, 5)}, {}, "do not chain"),
        ({"0.bias": torch.zeros(1)}, {}, "not linear"),
        ({"0.weight": torch.zeros(1, 8, 1)}, {}, "not linear"),
        ({"0.weight": torch.zeros(1, 8), "0.running_mean": torch.zeros(8)}, {}, "running_mean"),
        ({"0.weight": torch.zeros(1, 8)}, {"activation": "exec"}, "exec"),
    ],
)
def test_invalid_probes_are_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], words: str
) -> None:
    save_file(tensors, tmp_path / "probe.safetensors", metadata=metadata)
    with pytest.raises(InputError, match=words) as caught:
        load_probe(str(tmp_path / "probe.safetensors"))
    assert "probe.safetensors" in str(caught.value)


def test_pickles_and_missing_files_are_refused(tmp_path: Path) -> None:
    torch.save({"0.weight": torch.zeros(1, 8)}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil.pt is not a safetensors file.*Convert"):
        load_probe(str(tmp_path / "evil.pt"))
    with pytest.raises(InputError, match="does not exist"):
        load_probe(str(tmp_path / "none.safetensors"))


def test_embeddings_of_another_clip_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1, 8)}, tmp_path / "p.safetensors")
    with pytest.raises(ShapeError, match=r"\(5, 16\).*\[B, 8\].*this CLIP"):
        load_probe(str(tmp_path / "p.safetensors"))(torch.zeros(5, 16))
