import pytest
import torch
from torch import Tensor

from unclip.config import load, to_dict
from unclip.diffusion import guidance, samplers
from unclip.diffusion.process import Denoised, DiffusionConfig
from unclip.errors import ConfigError, ShapeError
from unclip.models.classifier import Classifier, ClassifierConfig, classification_loss, log_probability
from unclip.models.unet import ContextAttention, UNetConfig

UNET = UNetConfig(
    8, channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), head_channels=8, norm_groups=4
)
CONFIG = ClassifierConfig(UNET, DiffusionConfig(100))


def images(labels: Tensor) -> Tensor:
    """Class 0 is bright in the left half, class 1 in the right."""
    x0 = torch.full((len(labels), 3, 8, 8), -0.6)
    x0[labels == 0, :, :, :4] = 0.6
    x0[labels == 1, :, :, 4:] = 0.6
    return x0


@pytest.fixture(scope="module")
def trained() -> Classifier:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Classifier(CONFIG, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        labels = torch.randint(2, (32,), generator=generator)
        t = torch.randint(100, (32,), generator=generator)
        noise = torch.randn(32, 3, 8, 8, generator=generator)
        loss = classification_loss(model.diffusion, model, images(labels), labels, t, noise)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def test_it_learns_and_is_more_certain_at_less_noise(trained: Classifier) -> None:
    labels = torch.arange(200) % 2
    noise = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def loss(t: int) -> float:
        timesteps = torch.full((200,), t)
        return (
            classification_loss(trained.diffusion, trained, images(labels), labels, timesteps, noise)[0].mean().item()
        )

    assert loss(0) < 0.1 and loss(50) < 0.2
    assert loss(99) > 0.4  # almost nothing of the image is left


def test_it_guides_samples_to_a_class(trained: Classifier) -> None:
    """The denoiser is exact for data that consist of one image per class."""
    diffusion = trained.diffusion
    both = images(torch.tensor([0, 1]))

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        alpha_bar = diffusion.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        distances = ((x_t[:, None] - alpha_bar.sqrt()[:, None] * both) ** 2).sum(dim=(2, 3, 4))  # [B, 2]
        weights = (-distances / (2 * (1 - alpha_bar.view(-1, 1)))).softmax(dim=1)
        return Denoised(torch.einsum("bk,kchw->bchw", weights, both))

    x_T = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(2))

    def share_of_class_0(target: int, guidance_scale: float) -> float:
        target_log_probability = log_probability(trained, torch.full((40,), target))
        guided = guidance.classifier(diffusion, denoise, target_log_probability, guidance_scale)
        samples = samplers.ddim(diffusion, guided, x_T, 20)
        return (samples[..., :4].mean(dim=(1, 2, 3)) > samples[..., 4:].mean(dim=(1, 2, 3))).float().mean().item()

    assert 0.2 < share_of_class_0(0, 0.0) < 0.8
    assert share_of_class_0(0, 5.0) > 0.9
    assert share_of_class_0(1, 5.0) < 0.1
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in trained.parameters())


def test_log_probability_is_normalised(trained: Classifier) -> None:
    x_t, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 50, 99])
    total = sum(log_probability(trained, torch.full((3,), label))(x_t, t).exp() for label in (0, 1))
    torch.testing.assert_close(total, torch.ones(3))


@torch.no_grad()
def test_it_uses_the_timestep_and_attention(trained: Classifier) -> None:
    x_t = torch.randn(1, 3, 8, 8)
    expected = trained(x_t, torch.tensor([0]))
    assert not torch.allclose(trained(x_t, torch.tensor([99])), expected)
    attention = next(block for block in trained.blocks if isinstance(block, ContextAttention))
    weight = attention.to_out.weight.clone()
    attention.to_out.weight.zero_()
    assert not torch.allclose(trained(x_t, torch.tensor([0])), expected)
    attention.to_out.weight.copy_(weight)


def test_wrong_inputs_are_reported() -> None:
    model = Classifier(CONFIG, 2)
    x0 = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ShapeError, match=r"got labels \(3,\), expected \(2,\)"):
        classification_loss(model.diffusion, model, x0, torch.zeros(3).long(), torch.zeros(2).long(), x0)
    with pytest.raises(ConfigError, match="num_classes: got 1"):
        Classifier(CONFIG, 1)


def test_its_configuration_survives_a_round_trip() -> None:
    assert load(ClassifierConfig, to_dict(CONFIG)) == CONFIG
