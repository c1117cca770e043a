"""Model sizes of GLIDE agree with their table and with the paper, and reach the settings of a run."""

import pytest

from pipelines.config import load
from tests.unclip.systems.sized import count_parameters, shapes
from unclip.errors import ConfigError
from unclip.systems.glide.generator import GLIDE
from unclip.systems.glide.noised_clip import NOISED_CLIP
from unclip.systems.glide.sizes import MODEL_SIZES, ParameterCounts
from unclip.systems.unclip import sizes as unclip_sizes


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_sizes_have_the_number_of_parameters_in_the_table(name: str) -> None:
    size = MODEL_SIZES[name]
    clip = shapes(size)  # type: ignore[arg-type]
    counts = (GLIDE.network(size.glide, clip), NOISED_CLIP.network(size.noised_clip, clip))
    assert ParameterCounts(*map(count_parameters, counts)) == size.num_parameters


def test_glide_has_the_sizes_of_the_paper() -> None:
    """Nichol et al. 2022, section 4.1: 2.3 B in the U-Net, 1.2 B in the text Transformer without its token embeddings."""
    size = MODEL_SIZES["glide"]
    model, trainer = size.glide.model, size.glide.trainer
    assert size.num_parameters.glide == pytest.approx(3.5e9, rel=0.05)
    assert model.unet.channels == 512 and model.diffusion.schedule == "cosine" and model.text_drop_prob == 0.2
    assert (model.text.width, model.text.depth) == (2048, 24)
    assert 12 * model.text.depth * model.text.width**2 == pytest.approx(1.2e9, rel=0.05)
    assert (trainer.batch_size, trainer.num_samples) == (2048, 2_500_000 * 2048)


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_a_run_has_the_settings_of_its_size(name: str) -> None:
    size = MODEL_SIZES[name]
    assignments = ["ingest.urls=unknown", "system=glide", f"model_size={name}"]
    config = load("text_to_image", None, assignments)
    assert config.glide == size.glide and config.noised_clip == size.noised_clip and not config.with_noised_clip
    assert config.upsamplers == {str(each.model.output_size): each for each in size.upsamplers}
    assert config.evaluate.sampling.glide == size.sampling.glide
    assert (config.clip.model, config.clip.pretrained) == (size.clip, size.pretrained)


@pytest.mark.parametrize("name", ["demo", "small", "base"])
def test_the_parts_that_unclip_has_too_are_the_same(name: str) -> None:
    """So they are trained once; and the generators of the sizes above the demo's differ in their conditions only."""
    settings = ["ingest.urls=unknown", f"model_size={name}"]
    ours, unclip = load("text_to_image", None, [*settings, "system=glide"]), load("text_to_image", None, settings)
    assert ours.upsamplers == unclip.upsamplers and ours.clip == unclip.clip and ours.download == unclip.download
    decoder = unclip_sizes.MODEL_SIZES[name].decoder
    assert ours.glide.model.unet == decoder.model.unet
    is_same = ours.glide.trainer == decoder.trainer and ours.glide.model.diffusion == decoder.model.diffusion
    assert is_same == (name != "demo"), "the demo's generator has to learn in minutes what no embedding tells it"


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["upsamplers.40={}"], "upsamplers.40: got 40, expected a multiple of 16, the output resolution of glide"),
        (["evaluate.sampling.upsamplers.32.num_steps=2"], "evaluate.sampling.upsamplers.32: no such upsampler"),
        (
            ["with_noised_clip=true", "noised_clip.model.image_size=8"],
            r"image_size: got 8, expected 16, the resolution",
        ),
        (["with_noised_clip=true", "noised_clip.model.diffusion.schedule=linear"], "noised_clip.model.diffusion"),
        (["model_size=dalle2"], "model_size: got 'dalle2'"),
        (["glide=3"], "glide: got 3, expected a section"),
    ],
)
def test_settings_that_do_not_fit_are_refused(assignments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("demo", None, ["system=glide", *assignments])


def test_the_image_encoder_for_noised_images_follows_the_generator() -> None:
    settings = ["glide.model.unet.image_size=32", "glide.model.unet.attention_resolutions=[8]"]
    config = load(
        "demo", None, ["system=glide", "with_noised_clip=true", *settings, "glide.model.diffusion.schedule=linear"]
    )
    assert config.noised_clip.model.image_size == 32 and config.noised_clip.model.diffusion.schedule == "linear"
