"""Model cards: what they tell, what they leave out, and texts of others in them."""

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.model_card import (
    EXPORTABLE,
    MAX_CARD,
    PREVIEW_ROWS,
    Facts,
    PartFacts,
    card,
    count_parameters,
    description,
    escaped,
    in_code,
    listing_of,
    write_preview,
)
from tasks.origin import Code
from tasks.tracking import MAX_DESCRIPTION
from unclip import imaging
from unclip.training import checkpoints

HOSTILE = "a|b](http://evil.example/x) <img src=x onerror=alert(1)> `code`\n# heading ![x](y) \u202e\x00"


def facts(**changes: Any) -> Facts:
    values: dict[str, Any] = {
        "name": "unclip-demo",
        "system": "unclip",
        "digest": "ab" * 32,
        "at": time.mktime((2026, 11, 29, 12, 0, 0, 0, 0, 0)),
        "parts": [PartFacts("prior", "prior", 1000, 500, None), PartFacts("decoder", "decoder", 2_500_000, 900, 64)],
        "clip": "in the stack",
        "snapshot": "cd" * 32,
        "rows": {"in": 4120, "kept": 4000, "dropped": 36, "failed": 84},
        "reasons": {"http_404": 70, "too_small": 36, "timeout": 14},
        "metrics": {"heldout": {"clip_score": 0.9176, "accuracy.colour": 1.0}, "unseen": {"clip_score": 0.86}},
        "intervals": {"heldout": {"clip_score": [0.9, 0.93]}},
        "captions": {"heldout": 256, "unseen": 128},
        "counts": {"heldout": {"clip_score": 256, "accuracy.colour": 173}},
        "image_size": 64,
        "images": ["heldout.png", "unseen.png"],
        "has_preview": True,
        "sampling": {"batch_size": 64, "decoder": {"guidance_scale": 3.0}},
        "settings": {"download": {"respect_robots": True, "opt_out_directives": ["noai"]}, "scenes": None},
        "code": Code("0.1.0", "12ab", "main", True, "https://host/unclip"),
        "pipeline": "demo",
    }
    return Facts(**{**values, **changes})


def test_a_card_tells_what_the_model_is_how_good_from_which_data_and_how_to_use_it() -> None:
    text = card(facts())
    for expected in (
        "# unclip-demo",
        "prior → decoder, 2.5 million parameters",
        "Images of 64 × 64 pixels",
        "![heldout samples](images/heldout.png)",
        "heldout, 256 captions",
        "0.9176 (0.9 to 0.93)",
        "1 (173 images)",
        "4,120 rows = 4,000 kept + 36 dropped + 84 failed",
        "the server answered with status 404",
        "unclip sample",
        "mlflow.pyfunc.load_model",
        "unclip export FOLDER",
        "unclip 0.1.0, commit `12ab` with changes that are in no commit",
        "Apache License 2.0",
        "keep the licences and rights of their owners",
        "robots.txt was obeyed",
        "X-Robots-Tag: noai",
        "`decoder.guidance_scale`",
        '"respect_robots": true',
    ):
        assert expected in text, expected
    for system in EXPORTABLE:
        assert "unclip export FOLDER --model unclip-demo" in card(facts(system=system)), system
    assert "export" not in card(facts(system="glide")), "diffusers has no such pipeline"
    assert "procedural" in card(facts(settings={"scenes": {"num_images": 10}}))
    assert "robots.txt was not read" in card(facts(settings={"download": {"respect_robots": False}}))


def test_metrics_without_intervals_and_runs_without_settings_have_a_card() -> None:
    text = card(facts(intervals={}, settings={}, code=Code(), clip=None, reasons={}, has_preview=False))
    assert "95 %" not in text and "## Code" not in text and "## Settings" not in text and "0.9176" in text


def test_f155_texts_of_others_are_no_markdown_and_no_html() -> None:
    shown = escaped(HOSTILE)
    assert "\n" not in shown and "\u202e" not in shown and "\x00" not in shown
    assert not re.search(r"(?<!\\)[\[\]()<>|`#!*_]", shown)
    assert in_code(HOSTILE).count("`") == 2 and "|" not in in_code(HOSTILE) and "\n" not in in_code(HOSTILE)
    text = card(facts(clip=HOSTILE, sampling={HOSTILE: HOSTILE}, settings={"x": "```\n# out"}, code=Code("1", HOSTILE)))
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<img|(?<!\\)\]\(http", outside) and "\n# out" not in outside
    password = "https://me:hunter2@host/x"
    assert "hunter2" not in card(facts(clip=password, settings={"ingest": {"urls": password}}))


def test_a_description_is_bounded_and_says_that_there_is_more() -> None:
    short = facts(reasons={}, sampling={})
    assert description(short).startswith("Text-to-image model"), "MLflow's table of versions shows the first line"
    assert "README" not in description(short)
    metrics = {f"group {i}": {f"metric {j}": j / 7 for j in range(60)} for i in range(4)}
    many = facts(metrics=metrics, captions={}, sampling={f"s{i}": "x" * 100 for i in range(5000)})
    assert len(description(many)) <= MAX_DESCRIPTION and "README.md" in description(many)
    assert "## Use" in description(many), "the table of metrics leaves room"
    assert "more metrics are in `README.md`" in description(many)
    assert len(card(dataclasses.replace(many, settings={"x": "y" * 100_000}))) <= MAX_CARD


def test_a_listing_has_tags_params_and_metrics() -> None:
    listing = listing_of(facts())
    assert listing.tags["unclip.image_size"] == "64" and listing.tags["unclip.git_commit"] == "12ab"
    assert listing.metrics == {"heldout.clip_score": 0.9176, "heldout.colour": 1.0, "unseen.clip_score": 0.86}
    assert listing.params["sampling.decoder.guidance_scale"] == 3.0 and listing.params["image_size"] == 64
    assert listing.dataset == ("demo", "cd" * 32)


def test_parameters_are_counted_from_the_header_of_the_weights(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    checkpoints.save(str(tmp_path), {"model": model.state_dict()}, {})
    assert count_parameters(f"{tmp_path}/model.safetensors") == 3 * 5 + 5 + 5 * 2 + 2
    for name, data in {"short": b"abc", "huge": b"\xff" * 8 + b"{}", "none": (2).to_bytes(8, "little") + b"[]"}.items():
        (tmp_path / name).write_bytes(data)
        assert count_parameters(str(tmp_path / name)) is None


def test_a_preview_has_whole_rows_of_the_grid(tmp_path: Path) -> None:
    images = torch.linspace(-1, 1, 4 * 8).view(-1, 1, 1, 1).expand(-1, 3, 96, 96)
    pixels = imaging.grid(images, columns=8, captions=["a caption"] * len(images))
    (tmp_path / "grid.png").write_bytes(imaging.png(pixels))
    assert write_preview(str(tmp_path / "grid.png"), str(tmp_path), num_rows=4)
    preview = imaging.from_png((tmp_path / "images" / "preview.png").read_bytes())
    expected = imaging.grid(images[: 8 * PREVIEW_ROWS], columns=8, captions=["a caption"] * 8 * PREVIEW_ROWS)
    assert preview.shape[1] <= 760
    assert abs(preview.shape[0] / preview.shape[1] - expected.shape[0] / expected.shape[1]) < 0.01
    assert np.ptp(preview) > 100
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert not write_preview(str(tmp_path / "broken.png"), str(tmp_path), 4)
