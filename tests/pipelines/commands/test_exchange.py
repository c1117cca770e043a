"""Export and import of diffusers pipelines by command."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.model_card import EXPORTABLE
from tests.pipelines.command_line import call
from tests.unclip.interop import test_stable_diffusion, test_stable_unclip
from tests.unclip.systems import tiny_tokens
from tests.unclip.systems.tiny_stacks import tiny_stack
from unclip.interop import stable_diffusion, stable_unclip
from unclip.interop.pipeline import export_stack


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers") / "pipeline"
    export_stack(tiny_stack(), folder)
    return folder


def test_a_stack_is_imported_sampled_and_exported(tmp_path: Path, pipeline: Path) -> None:
    storage = tmp_path / "storage"
    result = call("import", pipeline, "--storage", storage, "--name", "karlo")
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == storage / "imported" / "karlo"
    assert json.loads((storage / "published" / "karlo.json").read_text())["at"] <= time.time()

    sampling = ("sample", "a cat", "--num", 1, "--out", tmp_path / "cat.png", "--storage", storage)
    assert call(*sampling).returncode == 0 and (tmp_path / "cat.png").stat().st_size > 100

    result = call("export", tmp_path / "back", "--storage", storage)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'back'}\n"
    for path in pipeline.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (tmp_path / "back" / path.relative_to(pipeline)).read_bytes()

    result = call("import", pipeline, "--storage", storage, "--name", "karlo")
    assert result.returncode == 2 and "already has a stack 'karlo'" in result.stderr
    result = call("export", tmp_path / "back", "--storage", storage)
    assert result.returncode == 2 and "expected a new or empty one" in result.stderr
    second = ("--upsampler-1024", storage / "imported" / "karlo" / "prior")
    result = call("export", tmp_path / "new", "--storage", storage, *second)
    assert result.returncode == 2 and "got a DiffusionPrior, expected the model folder of an upsampler" in result.stderr
    result = call("export", tmp_path / "new", "--storage", storage, "--image-variation", "--layout", "hub")
    assert result.returncode == 0 and "UnCLIPImageVariationPipeline" in (tmp_path / "new/model_index.json").read_text()


@pytest.mark.parametrize(
    ("module", "build", "scale"),
    [
        (stable_diffusion, test_stable_diffusion.plain, "guidance_scale 7.5"),
        (stable_unclip, test_stable_unclip.stack, "guidance_scale 10.0"),
    ],
)
def test_a_stack_of_latents_is_imported_and_exported(tmp_path: Path, module: Any, build: Any, scale: str) -> None:
    storage = tmp_path / "storage"
    module.export_stack(build(), tmp_path / "pipeline")
    result = call("import", tmp_path / "pipeline", "--storage", storage, "--name", "stable")
    assert result.returncode == 0 and result.stdout.strip() == str(storage / "imported" / "stable"), result.stderr
    result = call("export", tmp_path / "back", "--storage", storage)
    assert result.returncode == 0 and scale in result.stdout, result.stderr
    for name in ("model_index.json", "vae/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "pipeline" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    result = call("export", tmp_path / "new", "--storage", storage, "--image-variation")
    assert result.returncode == 2 and "Leave them out" in result.stderr and not (tmp_path / "new").exists()


def test_a_stack_that_diffusers_has_no_pipeline_for_is_refused(tmp_path: Path) -> None:
    stack = tiny_tokens.publish(tmp_path, "dalle", tiny_tokens.demo_clip())
    result = call("export", tmp_path / "new", "--model", stack)
    assert result.returncode == 2 and "its system is dalle" in result.stderr, result.stderr
    assert all(system in result.stderr for system in EXPORTABLE) and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model_index.json", {"prior": 3}),
        ("text_encoder/config.json", {"hidden_size": -1}),
        ("text_encoder/config.json", {"text_config": "x"}),
        ("prior_scheduler/scheduler_config.json", {"num_train_timesteps": "many"}),
        ("super_res_last/config.json", {"block_out_channels": []}),
    ],
)
def test_f53_a_pipeline_with_a_wrong_value_is_not_imported(
    tmp_path: Path, pipeline: Path, file: str, change: dict[str, object]
) -> None:
    shutil.copytree(pipeline, tmp_path / "pipeline", copy_function=os.link)
    path = tmp_path / "pipeline" / file
    content = json.loads(path.read_text()) | change
    path.unlink()
    path.write_text(json.dumps(content))
    result = call("import", tmp_path / "pipeline", "--storage", tmp_path / "storage")
    assert result.returncode in (1, 2) and result.stderr.startswith("error: ")
    assert not list(tmp_path.glob("storage/published/*")) and not list(tmp_path.glob("storage/imported/*"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("import", "nowhere"), 2, "nowhere: no such folder"),
        (("import", "."), 1, "model_index.json: cannot be read"),
        (("import", ".", "--name", "../x"), 2, "--name: got '../x'"),
        (("import", ".", "--name", ".."), 2, "--name: got '..'"),
        (("export", "new"), 2, "storage: no such folder"),
        (("export", "new", "--layout", "old"), 2, "'old' is not one of"),
    ],
)
def test_bad_input_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments, "--storage", tmp_path / "storage")
    assert result.returncode == code and message in result.stderr.replace("\n", " ")
    assert not list(tmp_path.rglob("*.json"))
