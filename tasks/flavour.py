"""MLflow flavour of a published stack: files beside it with which `mlflow.pyfunc.load_model` and `mlflow models serve` work.

    MLmodel                       names this module as the loader, and `stack` as its data; signature and input example
          stack/                  the stack; see `unclip.systems.system`
          requirements.txt        python_env.yaml, input_example.json, serving_input_example.json: as MLflow expects them

The loader is this module of the installed package. Nothing in the folder is executed or unpickled, and the stack is read and
checked as everywhere else.
"""

import importlib.metadata
import json
import math
import sys
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from tasks.untrusted.normalise import MAX_CAPTION_CHARACTERS
from unclip import config, files, imaging
from unclip.errors import InputError
from unclip.systems.system import System, SystemSpec, find_system, load_stack, read_stack, sample_captions

STACK = "stack"
"""Folder of the stack in that of the model."""
MODEL_FILE = "MLmodel"
EXAMPLE_CAPTION = "a large red circle on a blue background"
MAX_ROWS = 256
"""Rows of one call."""
_RANGES = {"seed": (0, 2**63 - 1), "steps": (1, 1_000)}
"""Column -> least and largest value; MLflow's integers have 64 bits."""

_OPTIONS = ("seed", "negative_caption", "guidance_scale", "steps")
_SHORTCUTS = ("guidance_scale", "steps")
"""Columns that are named as the options of `unclip sample` that mean the same; see `SystemSpec.shortcuts`."""
_PINNED = ("mlflow", "torch", "open_clip_torch", "safetensors", "ray")


def write(folder: str, run_id: str) -> None:
    """Write the files of the flavour into a folder that has a stack in `stack/`.

    Args:
        folder: path or URI.
        run_id: MLflow run that publishes the stack; may be empty.
    """
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import add_to_model
    from mlflow.types import ColSpec, Schema

    optional = {"seed": "long", "negative_caption": "string", "guidance_scale": "double", "steps": "long"}
    inputs = Schema(
        [ColSpec("string", "caption"), *(ColSpec(kind, name, required=False) for name, kind in optional.items())]
    )
    example = {"columns": ["caption", "seed"], "data": [[EXAMPLE_CAPTION, 0]]}
    described = {"artifact_path": "input_example.json", "serving_input_path": "serving_input_example.json"}
    described |= {"type": "dataframe", "pandas_orient": "split"}
    model = Model(
        run_id=run_id or None,
        signature=ModelSignature(inputs, Schema([ColSpec("binary", "png")])),
        saved_input_example_info=described,
    )
    add_to_model(model, __name__, data=STACK, python_env="python_env.yaml")  # type: ignore[no-untyped-call]
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    contents = {
        MODEL_FILE: model.to_yaml(),
        "requirements.txt": _requirements(),
        "python_env.yaml": f"python: {python}\ndependencies:\n- -r requirements.txt\n",
        "input_example.json": json.dumps(example),
        "serving_input_example.json": json.dumps({"dataframe_split": example}, indent=2),
    }
    for name, text in contents.items():
        files.write(f"{folder}/{name}", text.encode())


def _requirements() -> str:
    """Packages of this environment that sampling needs, in pip's format.

    unclip itself is a comment: pip would look its name up in an index, which may have another package of this name.
    """
    lines = []
    for name in ("unclip", *_PINNED):
        try:
            version = importlib.metadata.version(name).partition("+")[0]  # no index has versions such as 2.9.0+cpu
        except importlib.metadata.PackageNotFoundError:
            continue
        lines.append(
            f"# unclip {version}: install it from its own source" if name == "unclip" else f"{name}=={version}"
        )
    return "\n".join(lines) + "\n"


def _load_pyfunc(path: str) -> "StackModel":
    """Load the stack at a local path; MLflow calls it.

    Raises:
        CheckpointError: files of the stack are missing or damaged, or do not fit each other.
    """
    import torch

    stack = read_stack(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return StackModel(find_system(stack.system), load_stack(stack).to(device))


class StackModel:
    """A stack behind MLflow's interface of a Python function."""

    def __init__(self, spec: SystemSpec, system: System) -> None:
        self.spec, self.system = spec, system

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Sample an image for each row.

        Rows with the same options are sampled together, as `sample_captions` does with their captions in order: N rows with one
        caption and seed S give the images of `unclip sample CAPTION --seed S --num N`.

        Args:
            model_input: pandas DataFrame with the column `caption`, and as desired `seed` (0), `negative_caption`,
                `guidance_scale` and `steps` (as published).
            params: unused; MLflow passes it.

        Returns:
            pandas DataFrame with the column `png`: bytes of PNG files.

        Raises:
            InputError: a value is invalid, or the system does not support an option.
        """
        import pandas  # type: ignore[import-untyped]

        rows = self._rows(model_input)
        groups: dict[Hashable, list[int]] = {}
        for index, row in enumerate(rows):
            options = (row["seed"], row.get("guidance_scale"), row.get("steps"), "negative_caption" in row)
            groups.setdefault(options, []).append(index)
        images: list[bytes] = [b""] * len(rows)
        for indices in groups.values():
            first = rows[indices[0]]
            negative = [rows[i]["negative_caption"] for i in indices] if "negative_caption" in first else None
            sampled = sample_captions(
                self.system,
                [rows[i]["caption"] for i in indices],
                seed=first["seed"],
                sampling=self._sampling(first),
                negative=negative,
            )
            for index, pixels in zip(indices, imaging.to_uint8(sampled), strict=True):
                images[index] = imaging.png(pixels)
        return pandas.DataFrame({"png": images})

    def _rows(self, model_input: Any) -> list[dict[str, Any]]:
        """Checked values of each row; options that are missing are left out, but for the seed."""
        if not 1 <= len(model_input) <= MAX_ROWS:
            raise InputError(f"input: got {len(model_input)} rows, expected 1 to {MAX_ROWS}. Send them in parts.")
        unknown = set(model_input.columns) - {"caption", *_OPTIONS}
        if unknown or "caption" not in model_input.columns:
            expected = f"caption, and as desired {', '.join(_OPTIONS)}"
            raise InputError(f"input: got the columns {sorted(map(str, model_input.columns))}, expected {expected}.")
        rows = []
        for values in model_input.to_dict("records"):
            row: dict[str, Any] = {"seed": 0}
            row |= {name: value for name, value in values.items() if not _is_missing(value)}
            for name in {"caption", "negative_caption"} & row.keys():
                _check_caption(name, row[name])
            if not row.get("caption", "").strip():
                raise InputError("caption: got an empty caption, expected a description of the image.")
            for name, (least, most) in _RANGES.items():
                if name in row:
                    row[name] = _integer(name, row[name], least, most)
            if "guidance_scale" in row:
                row["guidance_scale"] = _finite("guidance_scale", row["guidance_scale"])
            rows.append(row)
        if "negative_caption" in model_input.columns and "negative" not in self.spec.inputs:
            raise InputError(f"negative_caption: not supported by the system {self.spec.name}. Leave it out.")
        return rows

    def _sampling(self, row: Mapping[str, Any]) -> Any:
        """Published sampling settings with those of a row.

        Raises:
            ConfigError: a value is out of range.
        """
        values = config.to_dict(self.system.sampling)
        for name in [name for name in _SHORTCUTS if name in row]:
            if name not in self.spec.shortcuts:
                raise InputError(f"{name}: not supported by the system {self.spec.name}. Leave it out.")
            values = config.override(values, f"{self.spec.shortcuts[name]}={row[name]}")
        return config.load(self.spec.sampling, values)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _check_caption(name: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > MAX_CAPTION_CHARACTERS:
        got = f"{len(value):,} characters" if isinstance(value, str) else type(value).__name__
        raise InputError(f"{name}: got {got}, expected a text of at most {MAX_CAPTION_CHARACTERS:,} characters.")


def _integer(name: str, value: Any, least: int, most: int) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not least <= int(value) <= most:
        raise InputError(f"{name}: got {value!r}, expected an integer from {least} to {most:,}.")
    return int(value)


def _finite(name: str, value: Any) -> float:
    if not isinstance(value, (int, float, np.number)) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{name}: got {value!r}, expected a finite number.")
    return float(value)
