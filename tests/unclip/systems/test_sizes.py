"""Model sizes agree with their table and with the paper, and reach the settings of a run."""

import dataclasses

import pytest
import torch

from pipelines.config import load
from tests.unclip.systems.sized import count_parameters, networks, num_parameters, shapes
from unclip.errors import ConfigError
from unclip.models.text import TextTransformer
from unclip.systems.unclip.sizes import MODEL_SIZES, ParameterCounts


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_sizes_have_the_number_of_parameters_in_the_table(name: str) -> None:
    size = MODEL_SIZES[name]
    counts = {part: count_parameters(network) for part, network in networks(size).items()}
    upsamplers = tuple(counts[each.model.name] for each in size.upsamplers)
    assert ParameterCounts(counts["prior"], counts["decoder"], upsamplers) == size.num_parameters
    resolutions = [size.decoder.model.unet.image_size, *(each.model.output_size for each in size.upsamplers)]
    assert resolutions[:-1] == [each.model.low_res_size for each in size.upsamplers]


def test_dalle2_has_the_sizes_of_table_3() -> None:
    size = MODEL_SIZES["dalle2"]
    counts = size.num_parameters
    assert counts.decoder == pytest.approx(3.5e9, rel=0.05)
    assert counts.upsamplers[0] == pytest.approx(700e6, rel=0.05)
    # The table gives one digit; its widths and depths add up to 1.23 B and 282 M.
    assert f"{counts.prior:.0e}" == f"{1e9:.0e}" and f"{counts.upsamplers[1]:.0e}" == f"{300e6:.0e}"
    decoder, upsamplers = size.decoder.model, [each.model for each in size.upsamplers]
    text = decoder.text_transformer
    assert (shapes(size).text.length, text.width, text.depth, text.num_heads) == (256, 2048, 24, 32)
    assert decoder.unet.attention_resolutions == (32, 16, 8) and decoder.unet.head_channels == 64
    assert [each.output_size for each in upsamplers] == [256, 1024]
    assert all(4 * each.unet.image_size == each.output_size for each in upsamplers)  # crops of a quarter
    assert [each.degradation.kind for each in upsamplers] == ["blur", "bsr"]
    assert [each.diffusion.schedule for each in upsamplers] == ["cosine", "linear"]


def test_dalle2_has_the_training_settings_of_table_3() -> None:
    size = MODEL_SIZES["dalle2"]
    trainers = [size.autoregressive_trainer, size.prior.trainer, size.decoder.trainer]
    trainers += [each.trainer for each in size.upsamplers]
    columns = {
        "batch_size": [4096, 4096, 2048, 1024, 512],
        "learning_rate": [1.6e-4, 1.1e-4, 1.2e-4, 1.2e-4, 1.0e-4],
        "weight_decay": [4.0e-2, 6.0e-2, 0, 0, 0],
        "beta2": [0.91, 0.96, 0.999, 0.999, 0.999],
        "adam_eps": [1e-10, 1e-6, 1e-8, 1e-8, 1e-8],
        "ema_decay": [0.999, 0.9999, 0.9999, 0.9999, 0.9999],
    }
    for name, expected in columns.items():
        assert [getattr(each, name) for each in trainers] == expected, name
    iterations = [each.num_samples // each.batch_size for each in trainers]
    assert iterations == [1_000_000, 600_000, 800_000, 1_000_000, 1_000_000]


def test_the_text_transformer_has_a_third_of_all_decoder_parameters() -> None:
    size = MODEL_SIZES["dalle2"]
    config = size.decoder.model
    with torch.device("meta"):
        text = TextTransformer(config.text_transformer, shapes(size).text, config.context_dim, 2048)
    assert num_parameters(text) == pytest.approx(1.3e9, rel=0.02)


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_a_run_has_the_settings_of_its_size(name: str) -> None:
    """Preset and run file override them, and resolutions follow from the chain of upsamplers."""
    size = MODEL_SIZES[name]
    assignments = ["ingest.urls=unknown", f"model_size={name}", "decoder.trainer.seed=3"]
    config = load("text_to_image", None, assignments)
    assert config.prior == size.prior and config.evaluate.sampling.prior == size.sampling.prior
    seeded = dataclasses.replace(size.decoder, trainer=dataclasses.replace(size.decoder.trainer, seed=3))
    assert config.decoder == seeded
    assert config.upsamplers == {str(each.model.output_size): each for each in size.upsamplers}
    assert list(config.evaluate.sampling.upsamplers) == list(config.upsamplers)
    assert (config.clip.model, config.clip.pretrained) == (size.clip, size.pretrained)
    other = load("text_to_image", None, [*assignments, "prior.kind=autoregressive"])
    assert other.prior.trainer == size.autoregressive_trainer


def test_an_unknown_size_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"model_size: got 'dale2'\. Did you mean 'dalle2'\?"):
        load("text_to_image", None, ["ingest.urls=unknown", "model_size=dale2"])


def test_dalle2_samples_as_the_paper_does() -> None:
    """Ramesh et al. 2022, Table 3."""
    size = MODEL_SIZES["dalle2"]
    parts = {"prior": size.sampling.prior, "decoder": size.sampling.decoder, **size.sampling.upsamplers}
    found = {name: (part.sampler, part.num_steps) for name, part in parts.items()}
    expected = {"prior": ("analytic_dpm", 64), "decoder": ("ddpm", 250), "256": ("ddim", 27), "1024": ("ddim", 15)}
    assert found == expected and size.decoder.model.diffusion.variance == "learned_range"
