"""A system of another package, defined completely in this file, and every command used with it.

The toy predicts the mean image of a caption from CLIP's text embedding with a two-layer network. No code outside this file
refers to it; it is found by its entry points.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.commands.run import run
from pipelines.config import load, shared_settings
from pipelines.dag import Binder
from pipelines.dataset import DatasetResources, PipelineConfig, dataset, finish
from pipelines.pipeline import Pipeline, Variant
from pipelines.systems.unclip import UnclipConfig
from tasks import tables
from tasks.snapshots import Snapshot
from tasks.stage import OwnResources
from tasks.stages.evaluate import EvaluateConfig, heldout_pairs
from tasks.stages.train import train
from tasks.store import Store
from tasks.tracking import PREVIEW_KEYS, PREVIEWS
from tasks.verification import state_of, survey
from tests.pipelines.command_line import STORAGE_NAME, call, call_apart, call_json, read_record
from unclip import files
from unclip.data import Batch
from unclip.errors import ConfigError
from unclip.models.clip import Clip
from unclip.systems.part import Part, Shapes, TrainingInputs
from unclip.systems.system import StackFiles, SystemSpec, load_model, load_system, sampling_of
from unclip.systems.upsampler import UpsamplerStageConfig
from unclip.training.batches import load_images, stack_rows
from unclip.training.memory import Network
from unclip.training.objective import Tensors
from unclip.training.settings import TrainerConfig

# The part


@dataclasses.dataclass(frozen=True)
class PainterConfig:
    image_size: int = 16
    """Resolution of the images, pixels."""
    width: int = 256
    """Number of hidden units."""
    trainer: TrainerConfig = TrainerConfig()
    """Training settings."""


class Painter(nn.Module):
    def __init__(self, image_size: int, width: int, embedding_dim: int) -> None:
        super().__init__()
        self.image_size, self.width, self.embedding_dim = image_size, width, embedding_dim
        self.layers = nn.Sequential(
            nn.Linear(embedding_dim, width), nn.SiLU(), nn.Linear(width, 3 * image_size * image_size)
        )

    def forward(self, text_embedding: Tensor) -> Tensor:
        """Predict images [B, 3, S, S] from text embeddings [B, E]."""
        return self.layers(text_embedding).unflatten(1, (3, self.image_size, self.image_size))


class PainterObjective:
    """Mean squared error of the pixels."""

    columns: Mapping[str, tuple[str, ...]] = {"images": ("jpg",), "embeddings": ("text_embedding",)}

    def __init__(self, config: PainterConfig, clip: Clip, preview: Batch) -> None:
        self.model = Painter(config.image_size, config.width, clip.embedding_dim)
        self.sample_size = {"pixels": config.image_size**2}
        self.state: Tensors = {}
        self._losses: dict[bool, list[Tensor]] = {True: [], False: []}
        self._preview = self.prepare(preview)

    def prepare(self, batch: Batch) -> Tensors:
        images = load_images(batch["jpg"], self.model.image_size)  # [B, 3, S, S]
        return {"images": images, "text_embedding": stack_rows(batch["text_embedding"])}

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        images = tensors["images"]
        loss = F.mse_loss(network(tensors["text_embedding"]).float(), images)
        mean_loss = (images - images.mean(dim=0)).square().mean()
        self._losses[network.training].append(torch.stack([loss.detach(), mean_loss]))
        return loss

    def metrics(self, training: bool) -> dict[str, float]:
        losses, self._losses[training] = self._losses[training], []
        loss, mean_loss = torch.stack(losses).sum(dim=0).tolist() if losses else (0.0, 0.0)
        return {"relative_loss": loss / mean_loss} if mean_loss else {}

    def preview(self, model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        with torch.no_grad():
            predicted = model(self._preview["text_embedding"].to(device)).cpu()
        return torch.cat([self._preview["images"], predicted.clamp(-1, 1)])

    def facts(self) -> dict[str, Any]:
        model = self.model
        sizes = {"image_size": model.image_size, "width": model.width, "embedding_dim": model.embedding_dim}
        return {"kind": "painter", **sizes}


def _objective(config: PainterConfig, inputs: TrainingInputs) -> PainterObjective:
    return PainterObjective(config, inputs.clip(), inputs.preview_rows())


def _network(config: PainterConfig, shapes: Shapes) -> Network:
    dim = shapes.embedding_dim
    return Network(lambda: Painter(config.image_size, config.width, dim), lambda batch: (torch.zeros(batch, dim),))


PAINTER = Part(
    name="painter",
    help="Train the painter: captions to the mean of their images.",
    config=PainterConfig,
    build=lambda facts: Painter(facts["image_size"], facts["width"], facts["embedding_dim"]),
    objective=_objective,
    reads=lambda _: PainterObjective.columns,
    network=_network,
    shows_rows=True,
)

# The system


@dataclasses.dataclass(frozen=True)
class ToySampling:
    batch_size: int = 8
    """Number of captions per batch."""
    grain: float = 0.1
    """Standard deviation of the noise added to the images."""


class Toy(nn.Module):
    def __init__(self, clip: Clip, painter: Painter, sampling: ToySampling) -> None:
        super().__init__()
        self.clip, self.painter, self.sampling = clip, painter, sampling

    @classmethod
    def load(cls, stack: StackFiles) -> "Toy":
        assert stack.clip is not None
        painter = load_model(stack.models["painter"], [PAINTER])
        assert isinstance(painter, Painter)
        return cls(stack.clip.load(), painter, sampling_of(stack, ToySampling))

    @property
    def image_size(self) -> int:
        return self.painter.image_size

    @property
    def device(self) -> torch.device:
        return next(self.painter.parameters()).device

    def sample(self, captions: Sequence[str], sampling: ToySampling, generator: torch.Generator) -> Tensor:
        tokens = self.clip.tokenize(list(captions)).to(self.device)
        images = self.painter(self.clip.encode_text(tokens).text_embedding)
        noise = torch.randn(images.shape, generator=generator, device=self.device)
        return (images + sampling.grain * noise).clamp(-1, 1)


SYSTEM = SystemSpec("toy", (PAINTER,), ToySampling, Toy.load, shortcuts={"guidance_scale": "grain"})

# The pipeline


@dataclasses.dataclass(frozen=True)
class ToyEvaluateConfig(EvaluateConfig):
    sampling: ToySampling = ToySampling()
    """Sampling settings."""


@dataclasses.dataclass(frozen=True)
class ToyConfig(PipelineConfig):
    painter: PainterConfig = PainterConfig()
    evaluate: ToyEvaluateConfig = ToyEvaluateConfig()


def toy(bind: Binder) -> Any:
    data = dataset(bind)
    painter = bind(train(PAINTER), data.snapshot, data.clip)
    return finish(bind, data, data.clip, painter)


VARIANTS = {"uneven": Variant("toy, uneven", ("painter.trainer.batch_size=33", "resources.num_workers=2"))}
PIPELINE = Pipeline(ToyConfig, toy, variants=VARIANTS)

# The package, and the tests

ENTRY_POINTS = f"""\
[unclip.systems]
toy = {__name__}:SYSTEM

[unclip.pipelines]
toy = {__name__}:PIPELINE
"""
RUN_FILE = """\
system = "toy"

[scenes]
num_images = 60
broken = 0
port = 8768

[clip]  # the model is that of the preset, as all systems share it
trainer.num_samples = 128

[resources]
embed.num_workers = 1
evaluate.num_workers = 1

[painter]
width = 64
trainer = {num_samples = 1024, batch_size = 32, learning_rate = 3e-3, ema_decay = 0.9, checkpoint_samples = 512}

[evaluate]
num_captions = 8

[publish]
name = "toy"
"""
STAGES = [
    "ingest",
    "download",
    "filter",
    "dedup",
    "clip",
    "embed",
    "curate",
    "report",
    "painter",
    "evaluate",
    "publish",
]
CAPTION = "a large red circle on a blue background"


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Install the toy for this process and for Ray workers."""
    site = tmp_path_factory.mktemp("site")
    (site / "toy-0.1.dist-info").mkdir()
    (site / "toy-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 0.1\n")
    (site / "toy-0.1.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "toy.toml"
    path.write_text(RUN_FILE)
    return path


@pytest.fixture(scope="module")
def finished(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of a finished run."""
    storage = tmp_path_factory.mktemp("finished") / STORAGE_NAME
    result = call_apart("run", "tiny", "--config", run_file, "--storage", storage)
    assert result.returncode == 0, result.stdout + result.stderr
    return storage


def record(storage: Path, stage: str) -> dict[str, Any]:
    """Return the only artifact of a stage."""
    [path] = (storage / "stages" / stage).glob("*.json")
    return read_record(storage, "stages", stage, path.name)


def test_it_is_planned(run_file: Path, tmp_path: Path) -> None:
    document = call_json("plan", "tiny", "--config", run_file, "--storage", tmp_path / "storage")
    assert [stage["name"] for stage in document["stages"]] == STAGES
    assert {stage["state"] for stage in document["stages"]} == {"to run"}
    assert document["config"]["painter"]["width"] == 64 and document["config"]["embed"]["batch_size"] == 16
    assert "decoder" not in document["config"] and "prior" not in document["config"]["evaluate"]["sampling"]
    printed = call("plan", "tiny", "--set", "ingest.urls=pairs", "--set", "system=toyy")
    assert printed.returncode == 2 and "got 'toyy'" in printed.stderr and "Did you mean 'toy'?" in printed.stderr


def test_the_option_system_means_the_setting() -> None:
    assignments = ["painter.width=64", "systems.toy.painter.trainer.seed=3", "systems.unclip.prior.trainer.seed=4"]
    loaded = load("tiny", None, assignments, system="toy")
    assert loaded == load("tiny", None, ["system=toy", *assignments]) and isinstance(loaded, ToyConfig)
    assert (loaded.painter.width, loaded.painter.trainer.seed, loaded.clip.model) == (64, 3, "unclip-demo")
    assert loaded.model_size is None, "the toy has no named sizes"
    assert load("tiny", None, assignments[2:]).prior.trainer.seed == 4  # type: ignore[attr-defined]
    for assignment, message in (
        ("model_size=small", "model_size: got 'small', but the system toy has no named sizes"),
        ("systems.tyo.painter.width=1", "got the system 'tyo'. Did you mean 'toy'?"),
        ("systems.toy=1", "expected systems.toy.section.field=value"),
        ("prior.trainer.seed=4", "prior: unknown setting"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            load("tiny", None, [assignment], system="toy")


def test_a_run_file_has_settings_for_single_systems(tmp_path: Path) -> None:
    path = tmp_path / "both.toml"
    path.write_text("[systems.toy.painter]\nwidth = 8\n[systems.unclip.prior.trainer]\nseed = 5\n")
    assert load("tiny", str(path), system="toy").painter.width == 8  # type: ignore[attr-defined]
    assert load("tiny", str(path)).prior.trainer.seed == 5  # type: ignore[attr-defined]
    path.write_text("[systems.tyo.painter]\nwidth = 8\n")
    with pytest.raises(ConfigError, match=r"systems.tyo: got the system 'tyo'. Did you mean 'toy'\?"):
        load("tiny", str(path))


def test_settings_of_the_same_type_survive_a_change_of_the_system() -> None:
    @dataclasses.dataclass(frozen=True)
    class Resources(DatasetResources):
        painter: OwnResources | None = None

    @dataclasses.dataclass(frozen=True)
    class Cascade(ToyConfig):
        resources: Resources = Resources()
        upsamplers: dict[str, UpsamplerStageConfig] = dataclasses.field(default_factory=dict)
        decoder: PainterConfig = PainterConfig()

    values = {
        "model_size": "demo",
        "resources": {"num_workers": 2, "prior": {"num_workers": 1}, "evaluate": {"num_workers": 3}},
        "upsamplers": {"64": {"trainer": {"seed": 1}}},
        "decoder": {"trainer": {"seed": 1}},
        "evaluate": {"num_captions": 3, "sampling": {"batch_size": 2}},
        "misspelt": 1,
    }
    assert shared_settings(values, UnclipConfig, Cascade) == {
        "model_size": "demo",
        "resources": {"num_workers": 2, "evaluate": {"num_workers": 3}},
        "upsamplers": values["upsamplers"],
        "evaluate": {"num_captions": 3},
        "misspelt": 1,
    }


def test_systems_are_completed() -> None:
    option = next(each for each in run.params if each.name == "system")
    assert {item.value for item in option.shell_complete(click.Context(run), "to")} == {"toy"}
    assert {item.value for item in option.shell_complete(click.Context(run), "")} >= {"toy", "unclip"}


def test_its_memory_is_planned(run_file: Path) -> None:
    result = call("plan", "train", "tiny", "--config", run_file)
    assert result.returncode == 0, result.stderr
    embedding_dim = 64
    parameters = embedding_dim * 64 + 64 + 64 * 768 + 768
    assert f"painter{parameters:>15,} " in result.stdout
    assert "painter: 1 GPU of 80 GiB: micro-batch" in result.stdout and "decoder" not in result.stdout


def test_it_is_trained_evaluated_and_published(finished: Path) -> None:
    summary = read_record(finished, "results", "tiny-toy", "summary.json")
    assert set(summary["seconds"]) == set(STAGES) and summary["captions"] == {"heldout": 8, "unseen": 4}
    assert {"colour", "background"} <= set(summary["accuracy"]) and summary["registered"]["name"] == "toy"
    system = load_system(summary["stack"])
    assert isinstance(system, Toy) and system.image_size == 16 and system.sampling == ToySampling()
    assert record(finished, "evaluate")["facts"]["stack"]["system"] == "toy"
    key = Snapshot.of(record(finished, "curate")["facts"]).open_places("train").keys(np.arange(1))[0]
    row = call_json("data", "show", key, "--storage", finished)
    assert [run["models"] for run in row["runs"]] == [["painter"]]


def test_it_samples(finished: Path, tmp_path: Path) -> None:
    grids = []
    for options in (["--seed", 1], ["--seed", 1, "--model", "toy"], ["--seed", 2], ["--seed", 2, "--set", "grain=0"]):
        out = tmp_path / "grid.png"
        result = call("sample", CAPTION, "--num", 3, *options, "--out", out, "--storage", finished)
        assert result.returncode == 0, result.stderr
        grids.append(out.read_bytes())
    assert grids[0] == grids[1] and len(set(grids)) == 3
    out = tmp_path / "short.png"
    assert (
        call("sample", CAPTION, "--num", 3, "--guidance-scale", 0, "--out", out, "--storage", finished).returncode == 0
    )
    assert out.read_bytes() == grids[-1]
    for option in (["--steps", 3], ["--sampler", "ddim"]):
        result = call("sample", CAPTION, *option, "--out", out, "--storage", finished)
        assert result.returncode == 2 and f"{option[0]}: not supported by the system toy" in result.stderr
    result = call("sample", CAPTION, "--set", "grains=0", "--out", out, "--storage", finished)
    assert result.returncode == 2 and "Did you mean 'grain'?" in result.stderr


def test_it_cannot_start_from_an_image(finished: Path, tmp_path: Path) -> None:
    image = next((finished / "results" / "tiny-toy").glob("heldout.png"))
    result = call("vary", image, "--out", tmp_path / "v.png", "--storage", finished)
    assert result.returncode == 2 and "cannot start from an image" in result.stderr
    result = call("inpaint", image, image, CAPTION, "--out", tmp_path / "i.png", "--storage", finished)
    assert result.returncode == 2 and "All systems of this package but dalle and parti can" in result.stderr


def test_its_part_can_be_trained_alone(finished: Path, run_file: Path) -> None:
    expected = record(finished, "painter")["digest"]
    for folder in ("stages", "artifacts"):
        shutil.rmtree(finished / folder / "painter")
    result = call("train", "painter", "tiny", "--config", run_file, "--storage", finished)
    assert result.returncode == 0, result.stderr
    assert record(finished, "painter")["digest"] == expected
    states = call_json("plan", "tiny", "--config", run_file, "--storage", finished)["stages"]
    assert {stage["state"] for stage in states} == {"cached"}


def test_it_memorises_a_few_rows(finished: Path, run_file: Path) -> None:
    result = call("train", "painter", "tiny", "--config", run_file, "--overfit", 4, "--storage", finished)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "400 steps on 4 rows" in result.stdout and "memorised" in result.stdout


def read_everything(storage: Path, run_file: Path, out: Path) -> dict[str, Any]:
    """Run all commands that read a storage, and a run that finds its work done; return what they print, without its path."""
    given = ("tiny", "--config", run_file, "--storage", storage)
    key = Snapshot.of(record(storage, "curate")["facts"]).open_places("train").keys(np.arange(1))[0]
    printed: dict[str, Any] = {
        "run": call("run", *given).stdout,
        "plan": call_json("plan", *given),
        "status": call("status", "--storage", storage).stdout,
        "list": call_json("data", "list", "--storage", storage),
        "diff": call("data", "diff", "1", "1", "--storage", storage).stdout,
        "show": call_json("data", "show", key, "--storage", storage),
        "estimate": call("estimate", *given).stdout,
    }
    for name, options in {"last": [], "registered": ["--model", "toy"]}.items():
        result = call("sample", CAPTION, "--num", 1, *options, "--out", out, "--storage", storage)
        assert result.returncode == 0, result.stderr
        printed[name] = files.sha256(out.read_bytes())
    for version in printed["list"]["versions"]:
        del version["committed"]  # the time of the commit, whoever made it
    assert {stage["state"] for stage in printed["plan"]["stages"]} == {"cached"}
    assert "everything is up to date" in printed["run"]
    forms = [str(storage), shlex.quote(str(storage)), json.dumps(str(storage))[1:-1]]
    text = json.dumps(printed)
    for form in sorted({*forms, *(json.dumps(form)[1:-1] for form in forms)}, key=len, reverse=True):
        text = text.replace(form, "STORAGE")
    return json.loads(text)


def taken_down(storage: Path) -> dict[str, Any]:
    """Take a row down; return the document that is printed."""
    key = json.loads((Path(record(storage, "painter")["uri"]).parent / PREVIEW_KEYS).read_text())[0]
    return call_json("takedown", "--key", key, "--storage", storage)


def as_an_earlier_release_wrote_it(storage: Path, root: str) -> None:
    """Put full paths into all records of a storage, as if it had been at another place when they were written."""
    before = Store(root)
    for folder in ("stages", "runs", "published", "results"):
        for path in (storage / folder).rglob("*.json"):
            files.write_json(str(path), before.resolve(files.read_json(str(path))))
    table = str(storage / "snapshots")
    rows = [before.resolve(row) for row in tables.read_with_commit_times(table).drop_columns("committed").to_pylist()]
    shutil.rmtree(table)
    part = pa.Table.from_pylist(rows)
    tables.append_files(table, [tables.write_part(table, "one", part)], part.schema)


@pytest.fixture
def hidden(finished: Path) -> Iterator[Path]:
    """The finished storage at another place; nothing is where it was."""
    away = finished.with_name("away")
    finished.rename(away)
    yield away
    shutil.rmtree(finished, ignore_errors=True)
    away.rename(finished)


@pytest.fixture(scope="module")
def expected(finished: Path, run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return read_everything(finished, run_file, tmp_path_factory.mktemp("expected") / "out.png")


def test_f70_a_moved_storage_of_an_earlier_release_works_as_before(
    expected: dict[str, Any], hidden: Path, finished: Path, run_file: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "mounted elsewhere"
    shutil.copytree(hidden, moved)
    as_an_earlier_release_wrote_it(moved, str(finished))
    assert read_everything(moved, run_file, tmp_path / "out.png") == expected
    ledger = taken_down(moved)
    assert ledger["deleted_previews"] and str(finished) not in json.dumps(ledger)
    assert not finished.exists()


def test_f71_a_copy_neither_reads_nor_writes_the_original(
    expected: dict[str, Any], hidden: Path, finished: Path, run_file: Path, tmp_path: Path
) -> None:
    """In place of the original are files of the same names that cannot be read as anything."""
    copy = tmp_path / "copy"
    shutil.copytree(hidden, copy)
    shutil.copytree(hidden, finished, copy_function=lambda _, path: Path(path).write_text("unreadable"))
    before = {path: path.read_text() for path in finished.rglob("*") if path.is_file()}
    assert read_everything(copy, run_file, tmp_path / "out.png") == expected
    logged = set((copy / "mlflow-artifacts").iterdir())
    result = call("train", "painter", "tiny", "--config", run_file, "--storage", copy)
    assert result.returncode == 0, result.stderr
    [run] = set((copy / "mlflow-artifacts").iterdir()) - logged
    assert (run / "artifacts" / "config.json").exists()
    assert taken_down(copy)["deleted_previews"]
    assert {path: path.read_text() for path in finished.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def compared(finished: Path, run_file: Path) -> Path:
    """Folder of a comparison of the toy with a variant that cannot be trained."""
    systems = ("--systems", "toy/uneven,toy")
    result = call_apart("compare", "tiny", *systems, "--config", run_file, "--storage", finished)
    assert result.returncode == 2, "the exit code of the system that failed"
    assert "toy, uneven: painter.trainer.batch_size: got 33" in result.stderr, result.stdout + result.stderr
    assert re.search(r"^toy +[01]\.\d{3} ", result.stdout, re.MULTILINE), result.stdout
    return finished / "results" / "tiny-comparison"


@pytest.mark.slow  # a process and a cluster of its own
def test_it_is_compared_though_another_system_fails(compared: Path, finished: Path, run_file: Path) -> None:
    systems = ("--systems", "toy/uneven,toy")
    document = call_json("compare", "tiny", *systems, "--config", run_file, "--storage", finished, code=2)
    assert [row["name"] for row in document["rows"]] == ["real images", "toy"]
    assert list(document["failures"]) == ["toy, uneven"]
    real, toy = document["rows"]
    assert set(toy["metrics"]) == set(real["metrics"]) == {"heldout", "unseen", "relations", "repeated"}
    assert real["metrics"]["heldout"]["accuracy.colour"] > 0.9 and real["metrics"]["relations"]["swapped.colour"] == 0
    assert real["metrics"]["repeated"]["place_entropy"] > 0 and toy["metrics"]["repeated"]["pairwise_distance"] > 0
    assert toy["parameters"] == 64 * 64 + 64 + 64 * 768 + 768 and toy["training_samples"] == 1024
    assert toy["training_flops"] == pytest.approx(1024 * 6 * (64 * 64 + 64 * 768), rel=0.05)
    assert toy["training_seconds"] > 0 and toy["seconds_per_image"] > 0
    names = {path.relative_to(compared).as_posix() for path in compared.rglob("*") if path.is_file()}
    assert names == {
        "summary.json",
        "table.html",
        "table.md",
        "table.png",
        "previews/images.png",
        "previews/keys.json",
        "manifest.json",
    }
    shown = json.loads((compared / "previews" / "keys.json").read_text())
    heldout = heldout_pairs(Snapshot.of(record(finished, "curate")["facts"]))["key"].to_pylist()
    assert shown == heldout[: len(shown)] and 1 < len(shown) <= 6
    kept = read_record(finished, "results", "tiny-comparison", "summary.json")["artifacts"]["evaluate"]
    assert set(kept) < {path.stem for path in (finished / "stages" / "evaluate").glob("*.json")}


@pytest.mark.slow
def test_results_of_a_comparison_are_verified(compared: Path, finished: Path) -> None:
    items = [item for item in survey(Store(str(finished))) if "tiny-comparison" in item.uri]
    assert items and {state_of(item) for item in items} == {"sound"}
    assert "unclip compare tiny --systems toy" in items[0].remedy


def test_a_takedown_finds_its_previews(finished: Path) -> None:
    """The last test, since it deletes from the storage."""
    folder = Path(record(finished, "painter")["uri"]).parent
    shown = json.loads((folder / PREVIEW_KEYS).read_text())
    assert any((folder / PREVIEWS).iterdir())
    document = call_json("takedown", "--key", shown[0], "--storage", finished)
    assert document["keys"] == [shown[0]]
    names = {run["id"]: run["name"] for run in document["runs"]}
    assert {"painter", "publish"} <= set(names.values())
    deleted = [names.get(run) for run in document["deleted_previews"]]  # of an evaluation, which logs no dataset: None
    assert "painter" in deleted and None in deleted and {*deleted} <= {"painter", "tiny-comparison", None}
    assert [model["name"] for model in document["models"]] == ["toy"]
    assert not (folder / PREVIEWS).exists() or not any((folder / PREVIEWS).iterdir())
