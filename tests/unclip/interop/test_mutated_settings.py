"""Any single value of an imported pipeline's JSON may be wrong: the import says so, or the value does not matter (F53)."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unclip.systems.tiny_stacks import tiny_stack
from unclip.errors import CheckpointError, UnclipError
from unclip.interop import clip, pipeline
from unclip.interop.decoder import import_decoder
from unclip.interop.pipeline import export_stack
from unclip.interop.prior import import_prior
from unclip.models.text import CaptionFeatures, caption_features
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig

DEEP: Any = 0
for _ in range(200):
    DEEP = [DEEP]
CHANGES: dict[str, Callable[[Any], Any]] = {
    "a text": lambda _: "wide",
    "negative": lambda _: -1,
    "NaN": lambda _: float("nan"),
    "a list": lambda value: [value, value],
    "huge": lambda _: 10**9,
    "nothing": lambda _: None,
    "infinite": lambda _: float("inf"),
    "an object": lambda value: {"value": value},
    "zero": lambda _: 0,
    "true": lambda _: True,
    "beyond 64 bits": lambda _: 10**30,
    "nested": lambda _: DEEP,
    "a fraction": lambda _: 2.5,
    "a long text": lambda _: "9" * 100_000,
    "an empty list": lambda _: [],
    "another number": lambda _: 3,
}
DELETE = "delete"
HARMLESS = {"NaN", "infinite", "beyond 64 bits"}
"""Changes that no place in a file makes acceptable."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values in a JSON object, except the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(content: dict[str, Any], path: tuple[Any, ...], change: str) -> dict[str, Any]:
    result = copy.deepcopy(content)
    inner: Any = result
    for key in path[:-1]:
        inner = inner[key]
    if change == DELETE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = CHANGES[change](inner[path[-1]])
    return result


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CaptionFeatures]:
    """A folder, and the features of its empty caption."""
    folder = tmp_path_factory.mktemp("mutated") / "exported"
    stack = tiny_stack()
    network = UNetConfig(16, 8, (1, 2), 1, norm_groups=4)
    export_stack(stack, folder, upsampler_1024=Upsampler(UpsamplerConfig(network, low_res_size=16, scale=2)))
    return folder, caption_features(stack.clip, stack.clip.tokenize([""]))


def importers(folder: Path, null_text: CaptionFeatures) -> dict[str, Callable[[], Any]]:
    """Folder in the pipeline -> function that imports what it belongs to, as `import_stack` does."""
    text, image = folder / "text_encoder", folder / "image_encoder"
    known_text, known_image = clip.text_from_transformers(text)[0], clip.vision_from_transformers(image)[0]

    def towers() -> None:  # building a CLIP takes long, so only where its settings have changed
        if clip.text_from_transformers(text)[0] != known_text or clip.vision_from_transformers(image)[0] != known_image:
            clip.import_clip(folder)

    def processor() -> None:
        clip._preprocessing(folder / "feature_extractor" / "preprocessor_config.json", known_image)

    def decoder() -> None:
        import_decoder(folder, null_text)

    def upsampler() -> None:
        pipeline._import_upsampler(folder, 8)

    return {
        "": lambda: pipeline._check_index(folder, "UnCLIPPipeline"),
        "prior": lambda: import_prior(folder, null_text),
        "prior_scheduler": lambda: import_prior(folder, null_text),
        "text_proj": decoder,
        "decoder": decoder,
        "decoder_scheduler": decoder,
        "super_res_first": upsampler,
        "super_res_last": upsampler,
        "super_res_scheduler": upsampler,
        "unet": lambda: pipeline._import_upsampler_1024(folder / "upsampler-1024", 16),
        "scheduler": lambda: pipeline._import_upsampler_1024(folder / "upsampler-1024", 16),
        "text_encoder": towers,
        "image_encoder": towers,
        "feature_extractor": processor,
    }


@pytest.mark.parametrize("per_place", [2, pytest.param(len(CHANGES) + 1, marks=pytest.mark.slow)])
def test_f53_every_wrong_value_is_refused_in_our_words_or_does_not_matter(
    exported: tuple[Path, CaptionFeatures], per_place: int
) -> None:
    folder, null_text = exported
    functions = importers(folder, null_text)
    kinds, count, refused = [DELETE, *CHANGES], 0, 0
    files = [path for path in sorted(folder.rglob("*.json")) if path.parent.name != "tokenizer"]
    assert len(files) == 14
    torch.manual_seed(0)
    for path in files:
        content = json.loads(path.read_text())
        run = functions["" if path.parent == folder else path.parent.name]
        run()
        for place in places(content):
            for number in range(per_place):
                change = kinds[(count if per_place < len(kinds) else number) % len(kinds)]
                count += 1
                path.write_text(json.dumps(changed(content, place, change)))
                try:
                    run()
                except UnclipError as error:
                    refused += 1
                    assert len(str(error)) < 5000
                else:
                    assert change not in HARMLESS, (path, place, change)
                finally:
                    path.write_text(json.dumps(content))
    assert count >= 260 and refused > count / 3, (count, refused)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": NaN}', '{"a": 1e999}', "[" * 100_000, '{"a": ' * 100_000])
def test_f53_a_file_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model_index\.json: (expected JSON|got a list)"):
        pipeline.import_stack(tmp_path)
