"""Imagen's pipeline: its DAG with either text encoder, its work, and a run from images to a published stack."""

from pathlib import Path

import pytest

from pipelines.config import load
from pipelines.pipeline import compose
from pipelines.workload import workload
from tests.pipelines.command_line import call, call_apart, call_json
from tests.unclip.interop.test_t5 import write as write_t5


def test_the_states_are_those_of_clip_or_of_a_t5(tmp_path: Path) -> None:
    own = compose(load("demo", None, ["system=imagen"]))
    assert "text_encoder" not in own and own["text_states"].parents == ("curate", "clip")
    assert own["imagen"].parents == own["upsampler-64"].parents == ("curate", "text_states")
    assert own["evaluate"].parents == ("curate", "clip", "clip", "imagen", "upsampler-64")
    t5 = compose(load("demo", None, ["system=imagen", f"text_encoder.name=local-dir:{write_t5(tmp_path)}"]))
    assert t5["text_encoder"].parents == () and t5["text_states"].parents == ("curate", "text_encoder")
    assert t5["evaluate"].parents == ("curate", "clip", "text_encoder", "imagen", "upsampler-64")


def test_work_is_counted() -> None:
    work = workload(load("demo", None, ["system=imagen"]))
    assert [training.name for training in work.trainings] == ["imagen", "upsampler-64"]
    assert all(training.flops_per_sample > 1e6 for training in work.trainings) and work.caption_flops > 1e6


RUN_FILE = """\
system = "imagen"

[scenes]
num_images = 60
broken = 0
port = 8824

[clip]  # the model is that of the preset, as all systems share it
trainer.num_samples = 128

[resources]
embed.num_workers = 1
evaluate.num_workers = 1

[evaluate]
num_captions = 8
"""


@pytest.mark.slow
def test_imagen_is_trained_published_and_sampled_with_either_text_encoder(tmp_path: Path) -> None:
    run_file, storage, out = tmp_path / "imagen.toml", tmp_path / "storage", tmp_path / "grid.png"
    folder = tmp_path / "t5"
    folder.mkdir()
    caption = "a large red circle on a white background"
    for text_encoder in ("", f'[text_encoder]\nname = "local-dir:{write_t5(folder)}"\n'):
        run_file.write_text(f"{RUN_FILE}\n{text_encoder}")
        result = call_apart("run", "tiny", "--config", run_file, "--storage", storage)
        assert result.returncode == 0, result.stdout + result.stderr
        document = call_json("plan", "tiny", "--config", run_file, "--storage", storage)
        assert {stage["state"] for stage in document["stages"]} == {"cached"}
        grids = []
        for options in ([], ["--set", "upsamplers.64.noise_level=100"], ["--negative", "a star"], ["--steps", 3]):
            result = call("sample", caption, "--num", 1, *options, "--out", out, "--storage", storage)
            assert result.returncode == 0, result.stderr
            grids.append(out.read_bytes())
        assert len(set(grids)) == len(grids)
    assert call("verify", "--storage", storage).returncode == 0
