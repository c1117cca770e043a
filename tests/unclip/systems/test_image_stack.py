"""Systems without text: trainings of their parts, and samples from their stacks."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from unclip import imaging
from unclip.config import to_dict
from unclip.data import Batch, RowReader, Source
from unclip.diffusion.process import DiffusionConfig
from unclip.downscaling import shrink
from unclip.errors import CheckpointError, ConfigError, InputError, UnclipError
from unclip.evaluation import scenes
from unclip.models.classifier import ClassifierConfig
from unclip.models.degradations import DegradationConfig, gaussian_blur
from unclip.models.image_denoiser import ImageDenoiserConfig, ImageDenoiserSampling
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import UpsamplerConfig, UpsamplerSampling
from unclip.systems.classes import SCENE_CLASSES, Classes
from unclip.systems.classifier import CLASSIFIER, ClassifierObjective, ClassifierStageConfig
from unclip.systems.denoiser import DENOISER, DenoiserObjective, DenoiserStageConfig
from unclip.systems.image_stack import ImageStack, ImageStackSampling
from unclip.systems.inpainting import inpaint
from unclip.systems.system import StackFiles, load_model, load_system, sample_batch, sample_captions, save_stack
from unclip.systems.upsampler import UpsamplerObjective
from unclip.training import checkpoints, trainer
from unclip.training.objective import Monitor
from unclip.training.settings import TrainerConfig

UNET = UNetConfig(
    8, channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), head_channels=8, norm_groups=4
)
DIFFUSION = DiffusionConfig(20, variance="learned_range")
DENOISER_CONFIG = DenoiserStageConfig(model=ImageDenoiserConfig(UNET, diffusion=DIFFUSION))
CLASSIFIER_CONFIG = ClassifierStageConfig(model=ClassifierConfig(UNET, DIFFUSION))
TRAINING = TrainerConfig(num_samples=64, batch_size=16, precision="fp32", validation_rows=8)
CLASSES = Classes(SCENE_CLASSES)
NUM_ROWS = 32


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> RowReader:
    """Procedural images with captions; the last caption has no class."""
    rng = np.random.default_rng(0)
    drawn = [scenes.random_scene(rng) for _ in range(NUM_ROWS)]
    images = [imaging.encode(scenes.render(scene, rng, 16), "JPEG") for scene in drawn]
    captions = [scenes.caption(scene, rng) for scene in drawn[:-1]] + ["a dog"]
    keys = [f"{number:02d}" for number in range(NUM_ROWS)]
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    pq.write_table(pa.table({"key": keys, "jpg": images, "caption": captions}), path)
    return RowReader.of_keys([Source((str(path),), ("jpg", "caption"))], keys)


class Recorder(Monitor):
    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def metrics(self, values: Any, samples_seen: int) -> None:
        self.values |= values


def read(rows: RowReader) -> Batch:
    return rows.read(np.arange(NUM_ROWS))


@pytest.fixture(scope="module")
def models(rows: RowReader, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model folders of a denoiser and a classifier that were trained for a few steps."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    objectives = {
        "denoiser": DenoiserObjective(DENOISER_CONFIG, CLASSES, rows.read(np.arange(4))),
        "classifier": ClassifierObjective(CLASSIFIER_CONFIG, CLASSES),
    }
    for name, objective in objectives.items():
        trainer.train(objective, rows, TRAINING, f"{folder}/{name}")  # type: ignore[arg-type]
    return {name: f"{folder}/{name}/model" for name in objectives}


@pytest.fixture(scope="module")
def stack(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> ImageStack:
    sampling = ImageStackSampling(denoiser=ImageDenoiserSampling(num_steps=3), batch_size=4, precision="fp32")
    folder = tmp_path_factory.mktemp("stack") / "stack"
    save_stack(str(folder), StackFiles("guided_diffusion", models, sampling=to_dict(sampling)))
    loaded = load_system(folder)
    assert isinstance(loaded, ImageStack)
    return loaded


def with_scale(stack: ImageStack, scale: float) -> ImageStackSampling:
    return dataclasses.replace(
        stack.sampling, denoiser=dataclasses.replace(stack.sampling.denoiser, classifier_scale=scale)
    )


def test_a_published_stack_samples_the_classes_of_captions(stack: ImageStack) -> None:
    assert stack.image_size == 8 and stack.sampling.denoiser.num_steps == 3
    images = sample_captions(stack, ["red circle"] * 3 + ["a tiny blue star"] * 3, seed=1)
    assert images.shape == (6, 3, 8, 8) and images.abs().max() <= 1
    others = sample_captions(stack, ["a big RED circle on white"] * 3 + ["a green star"] * 3, seed=1)
    assert torch.equal(images[:3], others[:3])
    assert not torch.equal(images[3], others[3]) and not torch.equal(images[4:], others[4:])


def test_a_classifier_changes_samples_of_classes_only(stack: ImageStack) -> None:
    captions = ["red circle", "a dog"]
    plain, guided = (
        sample_batch(stack, captions, 0, seed=1, sampling=with_scale(stack, scale)) for scale in (0.0, 100.0)
    )
    assert (plain[0] - guided[0]).abs().max() > 1e-3 and torch.equal(plain[1], guided[1])
    without = ImageStack(stack.denoiser)
    with pytest.raises(ConfigError, match="this stack has no classifier"):
        sample_captions(without, ["red circle"], sampling=with_scale(stack, 1.0))


def test_captions_without_a_class_are_refused_when_people_ask_for_them(stack: ImageStack) -> None:
    with pytest.raises(InputError, match=r"'a red dog', which belongs to no class .* green circle"):
        sample_captions(stack, ["a red dog"])


def test_parts_of_different_stacks_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    tensors, facts = checkpoints.load(models["classifier"])
    for number, change in enumerate(({"classes": facts["classes"][::-1]}, {"config": "linear"})):
        changed = {**facts, **change}
        if "config" in change:
            diffusion = {**facts["config"]["diffusion"], "schedule": "linear"}
            changed = {**facts, "config": {**facts["config"], "diffusion": diffusion}}
        checkpoints.save(f"{tmp_path}/{number}", tensors, changed)
        with pytest.raises(CheckpointError, match="Take models from one stack"):
            ImageStack.load(StackFiles("guided_diffusion", {**models, "classifier": f"{tmp_path}/{number}"}))
    with pytest.raises(CheckpointError, match="got classifier, expected a denoiser"):
        ImageStack.load(StackFiles("guided_diffusion", {"classifier": models["classifier"]}))


def test_a_training_without_classes_measures_its_bits_per_dimension(rows: RowReader, tmp_path: Path) -> None:
    config = dataclasses.replace(DENOISER_CONFIG, measures_bits_per_dim=True)
    torch.manual_seed(0)
    objective, monitor = DenoiserObjective(config, Classes(), rows.read(np.arange(4))), Recorder()
    trainer.train(objective, rows, TRAINING, str(tmp_path), monitor)
    model: Any = load_model(f"{tmp_path}/model", [DENOISER])
    assert model.class_embedding is None
    images = objective.prepare(rows.read(np.arange(4)))["images"]
    measured = monitor.values["bits_per_dim"]
    bound = model.diffusion.bits_per_dim(model, images, generator=torch.Generator().manual_seed(1))
    assert measured == model.measured["bits_per_dim"].item() == pytest.approx(bound.total.mean().item(), rel=0.1)
    assert measured > bound.prior.mean()
    system = ImageStack.load(StackFiles("ddpm", {"denoiser": f"{tmp_path}/model"}))
    assert sample_captions(system, ["whatever"] * 2).shape == (2, 3, 8, 8)


def test_training_on_the_bound_alone_lowers_it(rows: RowReader, tmp_path: Path) -> None:
    """L_vlb with loss-aware timesteps, Nichol & Dhariwal 2021, section 3.3."""
    diffusion = dataclasses.replace(DIFFUSION, prediction_type="v", vlb_only=True, timestep_sampling="loss_aware")
    model = ImageDenoiserConfig(UNET, diffusion=diffusion)
    config = DenoiserStageConfig(model=model, measures_bits_per_dim=True)
    found = []
    for num_steps in (1, 80):
        torch.manual_seed(0)
        objective, monitor = DenoiserObjective(config, Classes(), rows.read(np.arange(8))), Recorder()
        training = dataclasses.replace(TRAINING, num_samples=16 * num_steps, learning_rate=1e-2, ema_decay=0.5)
        trainer.train(objective, rows, training, f"{tmp_path}/{num_steps}", monitor)
        found.append(monitor.values["bits_per_dim"])
    assert objective.state["num_updates"].sum() == 80 * 16
    assert found[1] < found[0] - 0.5


def test_a_classifier_learns_from_images_with_a_class_only(rows: RowReader) -> None:
    torch.manual_seed(0)
    objective = ClassifierObjective(CLASSIFIER_CONFIG, CLASSES)
    tensors = objective.prepare(read(rows))
    assert tensors["label"][-1] == len(CLASSES) and (tensors["label"][:-1] < len(CLASSES)).all()

    def loss(count: int | None, changed: float = 0.0) -> torch.Tensor:
        images = tensors["images"].clone()
        images[-1] += changed
        given = {"images": images[:count], "label": tensors["label"][:count]}
        return objective.loss(objective.model, given, torch.Generator().manual_seed(0))

    assert loss(None) == loss(None, changed=1.0)
    assert loss(None).item() == pytest.approx(np.log(len(CLASSES)), abs=0.5)
    only_without = {"images": tensors["images"][-1:], "label": tensors["label"][-1:]}
    assert objective.loss(objective.model, only_without, torch.Generator().manual_seed(0)) == 0
    found = objective.metrics(True)
    assert found["share_with_class"] == pytest.approx((3 * 31) / (3 * 32 + 1))
    assert {"relative_loss", "accuracy_t_0000_0004", "loss_t_0015_0019"} <= set(found) and objective.metrics(True) == {}
    with pytest.raises(ConfigError, match="got no classes"):
        ClassifierObjective(CLASSIFIER_CONFIG, Classes())


def test_a_classifier_can_memorise_a_few_rows(rows: RowReader) -> None:
    torch.manual_seed(0)
    objective = ClassifierObjective(CLASSIFIER_CONFIG, CLASSES)
    optimizer = torch.optim.Adam(objective.model.parameters(), lr=5e-3)
    tensors = {name: values[:8] for name, values in objective.prepare(read(rows)).items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(150):
        if step == 120:
            objective.metrics(True)
        optimizer.zero_grad()
        objective.loss(objective.model, tensors, generator).backward()
        optimizer.step()
    assert objective.metrics(True)["relative_loss"] < 0.15


def test_a_training_tells_the_share_of_images_with_a_class(rows: RowReader) -> None:
    objective = DenoiserObjective(DENOISER_CONFIG, CLASSES, rows.read(np.arange(2)))
    for _ in range(2):
        objective.loss(objective.model, objective.prepare(read(rows)), torch.Generator().manual_seed(0))
    assert objective.metrics(True)["share_with_class"] == 31 / 32 and objective.metrics(True) == {}


def test_models_are_built_from_their_facts(models: dict[str, str]) -> None:
    for name, part in (("denoiser", DENOISER), ("classifier", CLASSIFIER)):
        model: Any = load_model(models[name], [part])
        assert model.class_names == SCENE_CLASSES and model.num_classes == 20


@pytest.mark.parametrize("classes", [7, None, [1, 2], ["red", "red"], ["!"], {"red": 1}])
def test_damaged_classes_are_refused(models: dict[str, str], tmp_path: Path, classes: Any) -> None:
    for name, part in (("denoiser", DENOISER), ("classifier", CLASSIFIER)):
        tensors, facts = checkpoints.load(models[name])
        checkpoints.save(str(tmp_path / name), tensors, {**facts, "classes": classes})
        with pytest.raises(UnclipError):
            load_model(str(tmp_path / name), [part])


def test_inpainting_follows_the_class_and_keeps_the_known_pixels(stack: ImageStack) -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    known = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    known[:, :, :, 4:] = False
    captions = ["red circle", "blue star"]
    samples = inpaint(stack, images, known, captions, seed=1)
    assert torch.equal(samples.where(known, torch.zeros(())), images.where(known, torch.zeros(())))
    assert not torch.equal(samples, inpaint(stack, images, known, captions[::-1], seed=1))
    with pytest.raises(InputError, match="belongs to no class"):
        inpaint(stack, images, known, ["red circle", "a dog"])
    with pytest.raises(InputError, match="reads classes only"):
        inpaint(stack, images, known, captions, negative=captions)


# Cascades


UPSAMPLER_CONFIG = UpsamplerConfig(
    UNetConfig(16, 8, (1, 2), 1, norm_groups=4),
    low_res_size=8,
    scale=2,
    degradation=DegradationConfig(min_blur_sigma=0.4),
    max_noise_level=10,
    reads_blur=True,
    diffusion=DiffusionConfig(20),
)


@pytest.fixture(scope="module")
def cascade(models: dict[str, str], rows: RowReader, tmp_path_factory: pytest.TempPathFactory) -> ImageStack:
    folder = str(tmp_path_factory.mktemp("cascade"))
    torch.manual_seed(0)
    objective = UpsamplerObjective(UPSAMPLER_CONFIG, rows.read(np.arange(4)), classes=CLASSES)
    training = dataclasses.replace(TRAINING, learning_rate=3e-3, ema_decay=0.5)
    trainer.train(objective, rows, training, folder)
    uris = {"denoiser": models["denoiser"], "upsampler-16": f"{folder}/model"}
    return ImageStack.load(StackFiles("cascaded_diffusion", uris))


def test_a_cascade_reads_the_class_and_the_level_of_its_input(cascade: ImageStack) -> None:
    [upsampler] = cascade.upsamplers
    assert upsampler.class_names == SCENE_CLASSES and cascade.image_size == 16
    low_res, label = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3])

    def sample(label: torch.Tensor | None = label, **settings: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        chosen = UpsamplerSampling(num_steps=3, **settings)
        return upsampler.sample(low_res, chosen, label=label, generator=generator)

    samples = [sample(), sample(label + 1), sample(None), sample(noise_level=9), sample(blur_sigma=0.5)]
    for number, one in enumerate(samples):
        assert all(not torch.allclose(one, other, atol=1e-6) for other in samples[:number]), number
    assert torch.equal(sample(None), sample(torch.tensor([len(CLASSES)])))
    with pytest.raises(ConfigError, match=r"blur_sigma: got 0\.7, expected at least 0, at most 0\.6 as in training"):
        sample(blur_sigma=0.7)
    images = sample_captions(cascade, ["red circle", "blue star"])
    assert images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("name", "value"),
    [("noise_level", torch.tensor([9])), ("blur_sigma", torch.tensor([0.5])), ("label", torch.tensor([3]))],
)
def test_the_network_of_a_cascade_depends_on_what_it_is_told_about_the_same_input(
    cascade: ImageStack, name: str, value: torch.Tensor
) -> None:
    generator = torch.Generator().manual_seed(0)
    x_t, low_res = (torch.randn(1, 3, size, size, generator=generator) for size in (16, 8))
    [upsampler] = cascade.upsamplers
    given, t = (
        {"noise_level": torch.tensor([2]), "blur_sigma": torch.tensor([0.4]), "label": torch.tensor([1])},
        torch.tensor([7]),
    )
    told, told_otherwise = (upsampler(x_t, t, low_res, **values) for values in (given, {**given, name: value}))
    assert not torch.allclose(told, told_otherwise, atol=1e-5)


def test_the_network_is_told_the_blur_and_the_noise_of_its_input(rows: RowReader) -> None:
    objective = UpsamplerObjective(UPSAMPLER_CONFIG, rows.read(np.arange(4)), classes=CLASSES)
    tensors = objective.prepare(read(rows))
    told: list[dict[str, torch.Tensor]] = []

    class Network(torch.nn.Module):
        def forward(
            self, x_t: torch.Tensor, t: torch.Tensor, low_res: torch.Tensor, noise_level: torch.Tensor, **given: Any
        ) -> torch.Tensor:
            told.append({"low_res": low_res, "noise_level": noise_level, **given})
            return torch.zeros_like(x_t)

    objective.loss(Network(), tensors, torch.Generator().manual_seed(0))
    sigma, level = told[0]["blur_sigma"], told[0]["noise_level"]
    assert level.min() >= 0 and level.max() <= 10 and len(level.unique()) > 2
    assert torch.equal(told[0]["label"], tensors["label"]) and sigma.max() <= 0.6
    assert 0.2 < (sigma == 0).double().mean() < 0.8 and sigma[sigma > 0].min() >= 0.4
    x0, low_res, sigma = objective._crops(tensors["images"], torch.Generator().manual_seed(0))
    assert torch.equal(x0, tensors["images"])  # the crops are whole images here
    assert torch.equal(low_res, gaussian_blur(shrink(tensors["images"], 8), sigma))
    kept = objective.model.diffusion.alphas_cumprod[level].to(low_res)[:, None, None, None]
    noise = (told[0]["low_res"] - kept.sqrt() * low_res) / (1 - kept).sqrt()
    assert (noise.flatten(1).std(dim=1) - 1).abs().max() < 0.25  # of the level that the network was told


def test_a_cascade_of_other_classes_is_refused(cascade: ImageStack, models: dict[str, str], tmp_path: Path) -> None:
    [upsampler] = cascade.upsamplers
    facts = {"kind": "upsampler", "config": to_dict(UPSAMPLER_CONFIG), "classes": list(SCENE_CLASSES[::-1])}
    checkpoints.save(str(tmp_path), {"model": upsampler.state_dict()}, {**facts, "samples_seen": 1})
    with pytest.raises(CheckpointError, match="upsampler-16: got 20 classes, expected the 20 classes of the denoiser"):
        ImageStack.load(
            StackFiles("cascaded_diffusion", {"denoiser": models["denoiser"], "upsampler-16": str(tmp_path)})
        )
