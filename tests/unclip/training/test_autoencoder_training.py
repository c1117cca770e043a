"""Autoencoders keep the trainer's promises, with a discriminator that starts late and a codebook that learns beside the loss."""

import copy
import dataclasses
import functools
import io
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.multiprocessing
from PIL import Image

from tests.unclip.training.trained_on_workers import reader, validation
from unclip.data import RowReader, Source
from unclip.evaluation import scenes
from unclip.models import clip as clip_models
from unclip.models.autoencoder import AutoencoderConfig
from unclip.models.discriminator import DiscriminatorConfig
from unclip.models.perceptual import ClipDistance
from unclip.systems.autoencoder import AUTOENCODER, AutoencoderStageConfig
from unclip.systems.autoencoder.part import AdversarialConfig, AutoencoderObjective, LatentsConfig, PerceptualConfig
from unclip.systems.autoencoder.sizes import MODEL_SIZES
from unclip.systems.system import load_model
from unclip.training import checkpoints, overfitting, trainer
from unclip.training.codebooks import CodebookConfig
from unclip.training.objective import Monitor
from unclip.training.parallel import ALONE, Workers
from unclip.training.settings import TrainerConfig

STEPS = 8
"""Steps of 16 samples; the discriminator starts after the third."""
Kind = Literal["kl", "ema", "loss", "gumbel", "perceptual"]
"""Bottleneck, or of vq the updates of its codebook; or "perceptual": kl with a perceptual loss."""
KINDS: tuple[Kind, ...] = ("kl", "ema", "loss", "gumbel")
FEW = ("kl", "ema", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("loss", "gumbel")))


@functools.cache
def distance() -> ClipDistance:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ClipDistance(clip_models.create("unclip-demo", None))


def config(kind: Kind, weight: float = 0.5, **model: Any) -> AutoencoderStageConfig:
    bottleneck = {"ema": "vq", "loss": "vq", "perceptual": "kl"}.get(kind, kind)
    sizes = {"image_size": 16, "channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "norm_groups": 4}
    network = AutoencoderConfig(
        **{**sizes, "latent_channels": 4, "bottleneck": bottleneck, "codebook_size": 24, **model}
    )
    return AutoencoderStageConfig(
        model=network,
        perceptual=PerceptualConfig(0.7 if kind == "perceptual" else 0.0),
        latents=LatentsConfig(kl_weight=0.1, kl_warmup_samples=64, temperature_samples=96),
        codebook=CodebookConfig("loss" if kind == "loss" else "ema", decay=0.8),
        discriminator=AdversarialConfig(weight, start_samples=48, model=DiscriminatorConfig(8, 2, 4)),
    )


def settings(**changes: Any) -> TrainerConfig:
    values = {"num_samples": 16 * STEPS, "batch_size": 16, "learning_rate": 1e-3, "ema_decay": 0.9}
    values |= {"checkpoint_samples": 48, "micro_batch_size": 4, "precision": "fp32", "log_samples": 16}
    return TrainerConfig(**{**values, **changes})


class Recorder(Monitor):
    def __init__(self, stop_before: int = 0) -> None:
        self.stop_before, self.num_steps = stop_before, 0
        self.losses: list[float] = []
        self.logged: list[dict[str, float]] = []
        self.previews: list[torch.Tensor] = []

    def step(self, samples_seen: int, loss: float) -> None:
        self.losses.append(loss)

    def metrics(self, values, samples_seen: int) -> None:
        self.logged.append(dict(values))

    def preview(self, images: torch.Tensor, samples_seen: int) -> None:
        self.previews.append(images)

    def wants_stop(self) -> bool:
        self.num_steps += 1
        return self.num_steps == self.stop_before


def run(
    folder: Path, name: str, kind: Kind, workers: Workers = ALONE, stop_before: int = 0, **changes: Any
) -> Recorder:
    """Train in `folder`/NAME, or resume there, and write the losses to NAME-RANK.json."""
    torch.manual_seed(0)
    rows = reader(folder)
    perceptual = distance() if kind == "perceptual" else None
    objective = AutoencoderObjective(config(kind), rows.read(np.arange(2)), perceptual)
    recorder = Recorder(stop_before)
    try:
        trainer.train(objective, rows, settings(**changes), f"{folder}/{name}", recorder, workers, validation(folder))
    except trainer.StoppedError:
        assert stop_before
    files = list((folder / name).glob("losses-*.json"))
    (folder / name / f"losses-{len(files)}-{workers.rank}.json").write_text(json.dumps(recorder.losses))
    return recorder


def run_rank_of_two(rank: int, folder: str, jobs: list[tuple[str, Kind, int, dict[str, Any]]]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name, kind, stop_before, changes in jobs:
        run(Path(folder), name, kind, Workers(rank, 2), stop_before, **changes)
    torch.distributed.destroy_process_group()


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return checkpoints.load(str(folder / name / "model"))[0]["model"]


@pytest.mark.parametrize("kind", [*FEW, "perceptual"])
def test_a_stopped_training_ends_with_the_same_weights(tmp_path: Path, kind: Kind) -> None:
    whole = run(tmp_path, "whole", kind)
    before = run(tmp_path, "stopped", kind, stop_before=5)
    after = run(tmp_path, "stopped", kind)
    assert before.losses + after.losses == whole.losses and len(whole.losses) == STEPS
    for name, value in weights(tmp_path, "whole").items():
        assert torch.equal(value, weights(tmp_path, "stopped")[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("ema",), ("kl", "loss", "gumbel")])
def test_ddp_and_fsdp_take_the_steps_of_one_worker_and_resume_from_each_other(
    tmp_path: Path, kinds: tuple[Kind, ...]
) -> None:
    jobs: list[tuple[str, Kind, int, dict[str, Any]]] = []
    alone = {kind: run(tmp_path, f"{kind} alone", kind).losses for kind in kinds}
    for kind in kinds:
        run(tmp_path, f"{kind} one then two", kind, stop_before=5)
        jobs += [
            (f"{kind} ddp", kind, 0, {"parallel": "ddp"}),
            (f"{kind} fsdp", kind, 0, {"parallel": "fsdp", "activation_checkpointing": True}),
            (f"{kind} one then two", kind, 0, {"parallel": "fsdp"}),
            (f"{kind} fsdp then ddp", kind, 5, {"parallel": "fsdp"}),
            (f"{kind} fsdp then ddp", kind, 0, {"parallel": "ddp"}),
        ]
    torch.multiprocessing.spawn(run_rank_of_two, (str(tmp_path), jobs), nprocs=2)
    for name, kind, _, _ in jobs:
        for key, value in weights(tmp_path, f"{kind} alone").items():
            torch.testing.assert_close(weights(tmp_path, name)[key], value, atol=5e-5, rtol=1e-3, msg=f"{name} {key}")
    for kind in kinds:
        for parallel in ("ddp", "fsdp"):
            [path] = (tmp_path / f"{kind} {parallel}").glob("losses-*-0.json")
            assert json.loads(path.read_text()) == pytest.approx(alone[kind], abs=1e-4), (kind, parallel)


@pytest.mark.parametrize("kind", FEW)
def test_a_discriminator_starts_late_and_is_no_part_of_the_loaded_model(tmp_path: Path, kind: Kind) -> None:
    recorder = run(tmp_path, "run", kind, preview_samples=64)
    training = [values for values in recorder.logged if "l1" in values]
    judged = ["discriminator_loss" in values for values in training]
    assert judged == [False] * 3 + [True] * 5
    names = {
        "adversarial_weight",
        "logits_of_images",
        "logits_of_reconstructions",
        "latent_std",
        "penalty",
        "relative_loss",
    }
    assert names <= set(training[-1])
    assert ("perplexity" in training[-1]) == (kind != "kl")
    saved = weights(tmp_path, "run")
    assert any(name.startswith("discriminator.") for name in saved)
    model = load_model(str(tmp_path / "run" / "model"), (AUTOENCODER,))
    assert {name for name in saved if not name.startswith("discriminator.")} == set(model.state_dict())
    images = recorder.previews[-1]
    assert images.shape == (4, 3, 16, 16) and images.abs().max() <= 1
    torch.testing.assert_close(model.decode(model.encode(images[:2])).clamp(-1, 1), images[2:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "adaptive"), [("kl", True), ("kl", False), ("perceptual", True)])
def test_verdicts_teach_the_autoencoder_and_hinge_losses_the_discriminator(
    tmp_path: Path, kind: Kind, adaptive: bool
) -> None:
    """Oracle: each term's gradient on its own, with two passes through the discriminator."""
    objective, rows = without_schedules(tmp_path, kind, adaptive)
    model = objective.model.train()
    tensors = objective.prepare(rows.read(np.arange(4)))
    loss = objective.loss(model, tensors, torch.Generator().manual_seed(1))
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]

    images = tensors["images"]
    noise = model.draw_noise(4, torch.Generator().manual_seed(1))
    reconstruction = model(images, noise).reconstruction
    own = [parameter for name, parameter in model.named_parameters() if not name.startswith("discriminator.")]
    theirs = list(model.discriminator.parameters())  # type: ignore[union-attr, arg-type]
    content = (reconstruction.images - images).abs().mean()
    if kind == "perceptual":
        content = content + 0.7 * distance()(reconstruction.images, images).mean()
    verdict = -model.discriminator(reconstruction.images).mean()  # type: ignore[operator]
    last = model.decoder.output.weight
    lengths = [torch.autograd.grad(each, last, retain_graph=True)[0].norm() for each in (content, verdict)]
    weight = 0.5 * float(lengths[0] / (lengths[1] + 1e-4)) if adaptive else 0.5
    penalty = 0.1 / (3 * 16**2) * reconstruction.penalty.mean()
    real, fake = (model.discriminator(each) for each in (images, reconstruction.images.detach()))  # type: ignore[operator]
    hinge = (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()) / 2
    expected = torch.autograd.grad(content + penalty + weight * verdict, own, retain_graph=True)
    expected += torch.autograd.grad(hinge, theirs)
    assert loss.item() == pytest.approx((content + penalty + weight * verdict + hinge).item(), rel=1e-5)
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(expected)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def without_schedules(folder: Path, kind: Kind, adaptive: bool = True) -> tuple[AutoencoderObjective, RowReader]:
    """Training that has all terms of its loss from the start."""
    torch.manual_seed(0)
    settings, rows = config(kind), reader(folder)
    adversarial = dataclasses.replace(settings.discriminator, adaptive=adaptive, start_samples=0)
    latents = dataclasses.replace(settings.latents, kl_warmup_samples=0)
    settings = dataclasses.replace(settings, discriminator=adversarial, latents=latents)
    perceptual = distance() if kind == "perceptual" else None
    return AutoencoderObjective(settings, rows.read(np.arange(2)), perceptual), rows


def test_the_loss_is_the_weighted_sum_of_its_terms(tmp_path: Path) -> None:
    """Oracle: all terms in float64, from the network's outputs, and the features of CLIP one layer after the other."""
    objective, rows = without_schedules(tmp_path, "perceptual")
    model: Any = objective.model.train()
    tensors = objective.prepare(rows.read(np.arange(4)))
    loss = objective.loss(model, tensors, torch.Generator().manual_seed(1))

    images, noise = tensors["images"].double(), model.draw_noise(4, torch.Generator().manual_seed(1))
    found = model(tensors["images"], noise).reconstruction
    mean, log_variance = model.to_bottleneck(model.encoder(tensors["images"])).double().chunk(2, dim=1)
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3))
    visual: Any = copy.deepcopy(distance().visual).double()

    def features(x: torch.Tensor) -> list[torch.Tensor]:
        x, layers = visual.stem(clip_models.prepare(distance(), x)), []
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = layer(x)
            layers.append(x / x.norm(dim=1, keepdim=True))
        return layers

    reconstructed = found.images.detach().double().requires_grad_()
    pairs = zip(features(reconstructed), features(images), strict=True)
    perceptual = sum((one - other).square().sum(dim=1).mean() for one, other in pairs) / 4
    content = (reconstructed - images).abs().mean() + 0.7 * perceptual
    read = found.images.detach().requires_grad_()
    real, fake = (model.discriminator(each).double() for each in (tensors["images"], read))
    # the last convolution again, as the gradients of its weights make the adaptive weight
    weight = model.decoder.output.weight.detach().double().requires_grad_()
    output = torch.nn.functional.conv2d(found.last_hidden.double(), weight, padding=1)
    [of_content] = torch.autograd.grad(content, reconstructed)
    [of_verdict] = torch.autograd.grad(-fake.mean(), read)
    lengths = [
        torch.autograd.grad(output, weight, gradient.double(), retain_graph=True)[0].norm()
        for gradient in (of_content, of_verdict)
    ]
    adaptive = lengths[0] / (lengths[1] + 1e-4)
    hinge = (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()) / 2
    expected = content + 0.1 / 768 * divergence.mean() - 0.5 * adaptive * fake.mean() + hinge
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert 0.7 * perceptual > 0.01 * expected and adaptive > 0.01


SCHEDULES = {
    # samples seen: KL weight per value of an image of 16 x 16 x 3, temperature
    0: (0.0, 1.0),
    250: (6.6 * 0.146446609 / 768, 0.0625 + 0.9375 * 0.982962913),
    500: (3.3 / 768, 0.0625 + 0.9375 * 0.933012702),
    1000: (6.6 / 768, 0.0625 + 0.9375 * 0.75),
    1500: (6.6 / 768, 0.53125),
    3000: (6.6 / 768, 0.0625),
    9000: (6.6 / 768, 0.0625),
}


def test_the_schedules_of_a_discrete_vae_are_cosines(tmp_path: Path) -> None:
    """Ramesh et al. 2021, appendix A.2: the KL weight grows from 0, and the temperature falls from 1 to 1/16."""
    latents = LatentsConfig(6.6, kl_warmup_samples=1000, temperature_samples=3000)
    rows = reader(tmp_path)
    objective = AutoencoderObjective(
        dataclasses.replace(config("gumbel", weight=0.0), latents=latents), rows.read(np.arange(2))
    )
    tensors = objective.prepare(rows.read(np.arange(4)))
    for samples_seen, (weight, temperature) in SCHEDULES.items():
        objective.samples_seen.fill_(samples_seen)
        loss = objective.loss(objective.model.train(), tensors, torch.Generator().manual_seed(1))
        noise = objective.model.draw_noise(4, torch.Generator().manual_seed(1))
        found = objective.model(tensors["images"], noise, temperature)
        expected = (found.images - tensors["images"]).abs().mean() + weight * found.penalty.mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6), samples_seen
        assert objective._penalty_weight(samples_seen) == pytest.approx(weight, rel=1e-6)
        assert objective._temperature(samples_seen) == pytest.approx(temperature, rel=1e-6)


def test_the_kl_weight_of_dalle_is_that_of_the_paper(tmp_path: Path) -> None:
    """Ramesh et al. 2021, appendix A.2: 6.6 / 192 for the mean over 32 x 32 positions, after 5,000 steps of 512 images."""
    stage = MODEL_SIZES["dalle"].stage
    small = dataclasses.replace(stage.model, channels=32, codebook_size=4, latent_channels=4)
    with torch.device("meta"):
        objective = AutoencoderObjective(dataclasses.replace(stage, model=small), reader(tmp_path).read(np.arange(1)))
    assert objective._penalty_weight(5_000 * 512) * 32 * 32 == pytest.approx(6.6 / 192)
    assert objective._penalty_weight(2_500 * 512) * 32 * 32 == pytest.approx(3.3 / 192)
    assert objective._temperature(75_000 * 512) == pytest.approx(0.53125)
    assert objective._temperature(150_000 * 512) == pytest.approx(1 / 16)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_autoencoder_memorises_sixteen_images(tmp_path: Path, kind: Kind) -> None:
    """Scenes, as random pixels fit into no bottleneck."""
    rng, jpegs = np.random.default_rng(0), [io.BytesIO() for _ in range(16)]
    for jpeg in jpegs:
        Image.fromarray(scenes.render(scenes.random_scene(rng), rng, 16)).save(jpeg, "JPEG", quality=95)
    keys = [f"{number:02d}" for number in range(16)]
    pq.write_table(pa.table({"key": keys, "jpg": [jpeg.getvalue() for jpeg in jpegs]}), tmp_path / "scenes.parquet")
    rows = RowReader.of_keys([Source((f"{tmp_path}/scenes.parquet",), ("jpg",))], keys)
    torch.manual_seed(0)
    stage = dataclasses.replace(config(kind, weight=0.0, channels=16), latents=LatentsConfig(temperature_samples=3200))
    objective = AutoencoderObjective(stage, rows.read(np.arange(2)))
    diagnosis = overfitting.Diagnosis()
    trainer.train(objective, rows, overfitting.settings(settings(), 16), str(tmp_path / "run"), diagnosis)
    assert diagnosis.has_memorised, diagnosis.relative_losses
