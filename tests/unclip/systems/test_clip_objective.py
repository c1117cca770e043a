"""Losses of CLIP's training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from unclip.models import clip
from unclip.systems.clip import ClipObjective

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SIGLIP = CLIP | {
    "custom_text": True,
    "init_logit_scale": 2.3,
    "init_logit_bias": -10.0,
    "text_cfg": CLIP["text_cfg"] | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},  # type: ignore[operator]
}


def objective(folder: Path, name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> ClipObjective:
    """Objective for an architecture that this library has only in this test."""
    (folder / f"{name}.json").write_text(json.dumps(settings))
    monkeypatch.setattr(clip, "OWN_ARCHITECTURES", folder)
    torch.manual_seed(0)
    return ClipObjective(name)


def features(one: ClipObjective) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of four pairs, and the cosines [4, 4] of their image and text embeddings."""
    images = clip.prepare(one.model, torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1)
    tensors = {"images": images, "tokens": one.tokenizer(["a red star", "a blue circle", "one", "two"])}
    image, text = one.model.encode_image(images), one.model.encode_text(tensors["tokens"])
    return tensors, F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


def test_a_model_with_a_bias_of_the_logits_has_siglips_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = objective(tmp_path, "tiny-sigmoid", SIGLIP, monkeypatch)
    tensors, cosines = features(one)
    logits = torch.tensor(2.3).exp() * cosines - 10.0
    signs = 2 * torch.eye(4) - 1
    expected = -F.logsigmoid(signs * logits).sum() / 4  # Zhai et al. 2023, eq. 2
    loss = one.loss(one.model, tensors, torch.Generator())
    torch.testing.assert_close(loss, expected)
    loss.backward()  # type: ignore[no-untyped-call]
    assert one.model.logit_bias.grad.abs() > 0 and one.model.logit_scale.grad.abs() > 0


def test_a_model_without_one_has_clips_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = objective(tmp_path, "tiny-clip", CLIP, monkeypatch)
    tensors, cosines = features(one)
    logits, pairs = one.model.logit_scale.exp() * cosines, torch.arange(4)
    expected = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2  # Radford et al. 2021, figure 3
    torch.testing.assert_close(one.loss(one.model, tensors, torch.Generator()), expected)
