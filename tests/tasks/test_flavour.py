"""The MLflow flavour of a stack: it samples what the stack samples, and nothing in its folder runs."""

import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml

from tasks import flavour
from tasks.registry import stack_in
from tasks.untrusted.normalise import MAX_CAPTION_CHARACTERS
from tests.unclip.systems import tiny_stacks
from unclip import config, imaging
from unclip.errors import CheckpointError, InputError
from unclip.systems.system import load_system, sample_captions

CAPTIONS = ["a red circle", "a blue star", "a red circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model, as `publish` writes it."""
    folder = tmp_path_factory.mktemp("model")
    assert tiny_stacks.publish(folder, text="clip") == folder / "stack"
    flavour.write(str(folder), "r" * 32)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return mlflow.pyfunc.load_model(str(folder))


def flavour_of(model: Any) -> Any:
    """The model without MLflow's checks of the signature, which also refuse some of these rows."""
    return model._model_impl


def pixels(answer: pd.DataFrame) -> np.ndarray:
    return np.stack([imaging.from_png(data) for data in answer["png"]])


def test_the_flavour_samples_what_sample_captions_samples_bit_for_bit(folder: Path, model: Any) -> None:
    stack = load_system(folder / "stack")
    expected = imaging.to_uint8(sample_captions(stack, CAPTIONS, seed=7))
    rows = pd.DataFrame({"caption": CAPTIONS, "seed": [7, 7, 7]})
    assert np.array_equal(pixels(model.predict(rows)), expected)
    mixed = pd.DataFrame({"caption": CAPTIONS, "seed": [7, 8, 7]})
    shown = pixels(model.predict(mixed))
    assert np.array_equal(shown[1:2], imaging.to_uint8(sample_captions(stack, CAPTIONS[1:2], seed=8)))
    assert np.array_equal(shown[[0, 2]], imaging.to_uint8(sample_captions(stack, CAPTIONS[::2], seed=7)))
    settings = config.to_dict(stack.sampling)
    for assignment in ("decoder.guidance_scale=2.5", "decoder.num_steps=3"):
        settings = config.override(settings, assignment)
    sampling = config.load(type(stack.sampling), settings)
    expected = imaging.to_uint8(
        sample_captions(stack, CAPTIONS, sampling=sampling, negative=["a green square"] * len(CAPTIONS))
    )
    options = {"guidance_scale": 2.5, "steps": 3, "negative_caption": "a green square"}
    assert np.array_equal(pixels(model.predict(pd.DataFrame({"caption": CAPTIONS}).assign(**options))), expected)


def test_the_signature_the_example_and_the_requirements_are_what_mlflow_expects(folder: Path, model: Any) -> None:
    assert model.metadata.get_input_schema().required_input_names() == ["caption"]
    example = model.input_example
    assert list(example.columns) == ["caption", "seed"] and len(model.predict(example)) == 1
    requirements = (folder / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("mlflow==") for line in requirements)
    assert not any(line.startswith("unclip") for line in requirements), "an index may have another package of this name"
    assert not any("+" in line for line in requirements if not line.startswith("#"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"caption": [" "]}, "empty caption"),
        ({"caption": ["x" * (MAX_CAPTION_CHARACTERS + 1)]}, "1,001 characters"),
        ({"caption": ["x"] * (flavour.MAX_ROWS + 1)}, "257 rows"),
        ({"caption": []}, "0 rows"),
        ({"caption": ["x"], "seed": [-1]}, "seed: got -1"),
        ({"caption": ["x"], "steps": [0]}, "steps: got 0, expected an integer from 1"),
        ({"caption": ["x"], "steps": [10**9]}, "steps: got 1000000000, expected an integer from 1"),
        ({"caption": ["x"], "guidance_scale": [float("inf")]}, "guidance_scale: got inf"),
        ({"caption": ["x"], "prompt": ["y"]}, "the columns"),
        ({"prompt": ["y"]}, "the columns"),
        ({"caption": [3]}, "int, expected a text"),
    ],
)
def test_f156_bad_rows_are_refused_before_anything_is_sampled(model: Any, rows: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        flavour_of(model).predict(pd.DataFrame(rows))


def test_f157_nothing_in_a_model_s_folder_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = tmp_path / "model"
    shutil.copytree(folder, planted)
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\n"
    for name in ("tasks.py", "flavour.py", "stack/__init__.py", "stack/unclip.py", "sitecustomize.py"):
        (planted / name).write_text(code)
    described = yaml.safe_load((planted / "MLmodel").read_text())
    described["flavors"]["python_function"] |= {"loader_module": "flavour", "code": "."}
    (planted / "MLmodel").write_text(yaml.safe_dump(described))
    stack = stack_in(str(planted))
    assert stack == str(planted / "stack")
    load_system(stack)
    flavour._load_pyfunc(stack)
    assert not ran.exists()
    weights = next((planted / "stack").rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError):
        flavour._load_pyfunc(stack)


def test_the_stack_of_a_version_of_an_earlier_release_is_found(folder: Path, tmp_path: Path) -> None:
    assert stack_in(str(folder)) == str(folder / "stack")
    assert stack_in(str(folder / "stack")) == str(folder / "stack"), "earlier releases registered the stack itself"
    (tmp_path / "stack").symlink_to(folder / "stack")
    with pytest.raises(InputError, match="outside of the model"):
        stack_in(str(tmp_path))
