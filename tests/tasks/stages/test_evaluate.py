"""Sampling and measuring with a tiny stack: what workers return, and the numbers that are made of it."""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import pickle
import signal
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from tasks import tables
from tasks.progress import Progress
from tasks.scoring import (
    Batch,
    InceptionWorker,
    Measured,
    SamplingWorker,
    Scoring,
    merge,
    sample_groups,
    scores_table,
)
from tasks.stage import Pinning, Resources
from tasks.stages.evaluate import (
    EvaluateConfig,
    bits_per_dim,
    caption_groups,
    evaluate,
    grid_of,
    summarise,
    unseen_captions,
)
from tasks.store import Store
from tests.unclip.systems import tiny_stacks
from unclip import files, imaging
from unclip.config import without_operational
from unclip.errors import ConfigError, InputError
from unclip.evaluation import distances, inception, metrics, retrieval, scenes
from unclip.evaluation.distances import Statistics
from unclip.evaluation.metrics import Sampled
from unclip.systems.system import (
    ClipFiles,
    StackFiles,
    batch_generator,
    load_system,
    read_stack,
    sample_captions,
)
from unclip.systems.unclip.sampling import SamplingConfig
from unclip.systems.unclip.stack import Stack
from unclip.training import checkpoints
from unclip.training.batches import load_images

BATCH, SHOWN = 32, 40
CAPTIONS = unseen_captions(110, seed=3)
MIXED = [*CAPTIONS[:40], "a photograph of a harbour"]


@dataclasses.dataclass(frozen=True)
class Config(EvaluateConfig):
    num_images: int = SHOWN
    sampling: SamplingConfig = SamplingConfig(batch_size=BATCH)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Published stacks by their resolution."""
    return {8 << num: tiny_stacks.publish(tmp_path_factory.mktemp(f"stack{num}"), num) for num in (0, 2)}


def stack_of(folder: Path) -> tuple[ClipFiles, StackFiles]:
    stack = read_stack(folder)
    assert stack.clip is not None
    return stack.clip, dataclasses.replace(stack, sampling={**stack.sampling, "batch_size": BATCH})


def sample_here(folder: Path, captions: list[str]) -> list[Measured]:
    """Results of a worker in this process for all batches of a group."""
    worker = SamplingWorker.__ray_metadata__.modified_class(*stack_of(folder), 0, 1)  # type: ignore[attr-defined]
    return [
        worker.sample(Batch(number, captions[start : start + BATCH], max(0, SHOWN - start)))
        for number, start in enumerate(range(0, len(captions), BATCH))
    ]


def test_results_of_workers_do_not_grow_with_the_resolution(folders: dict[int, Path]) -> None:
    """All but the images of the grid, which have 3 bytes a pixel."""
    small, large = (sample_here(folders[resolution], CAPTIONS) for resolution in (8, 32))
    assert [len(batch.shown) for batch in large] == [32, 8, 0, 0]
    slack = 256  # bytes, as pickles name memory by numbers of a few digits
    for one, other in zip(small, large, strict=True):
        assert one.shown.shape[1:] == (8, 8, 3) and other.shown.shape[1:] == (32, 32, 3)
        grown = len(pickle.dumps(other)) - len(pickle.dumps(one))
        assert abs(grown - len(other.shown) * (32**2 - 8**2) * 3) <= slack
    width = large[0].features.image_embedding.shape[1]
    assert len(pickle.dumps(large[2])) < 2 * BATCH * width * 4 + 4096 < BATCH * 32 * 32 * 3
    merged = merge(large, len(CAPTIONS))
    assert merged.seconds == sum(batch.seconds for batch in large) > 0
    assert len(merged.features.image_embedding) == len(CAPTIONS) and merged.shown.nbytes == SHOWN * 32 * 32 * 3


@pytest.mark.parametrize("captions", [CAPTIONS, MIXED], ids=["scenes", "mixed"])
def test_numbers_and_images_are_those_of_all_images_together(folders: dict[int, Path], captions: list[str]) -> None:
    folder = folders[32]
    system, clip = load_system(folder), stack_of(folder)[0].load()
    settings = dataclasses.replace(system.sampling, batch_size=BATCH)
    images = sample_captions(system, captions, seed=0, sampling=settings)
    embedding = clip.embed_images(clip.resize(images))
    text = clip.encode_text(clip.tokenize(captions)).text_embedding
    reference = F.normalize(torch.randn(50, embedding.shape[1], generator=torch.Generator().manual_seed(1)), dim=1)
    expected = {
        "clip_score": (embedding * text).sum(dim=1).mean().item(),
        "clip_frechet_distance": distances.frechet_distance(embedding, reference),
        "clip_r_precision": retrieval.r_precision(captions, embedding, text).mean().item(),  # type: ignore[union-attr]
    }
    pixels, marks = imaging.to_uint8(images), None
    if captions is CAPTIONS:
        wanted = [scenes.parse_caption(caption) for caption in captions]
        scores = [
            scenes.score(scenes.measure(image), scene) for image, scene in zip(pixels, wanted, strict=True) if scene
        ]
        for name in (*metrics.ATTRIBUTES, "place"):
            expected[f"accuracy.{name}"] = float(np.mean([score[name] for score in scores if name in score]))
        marks = [all(score[name] for name in metrics.ATTRIBUTES) for score in scores]
        expected["accuracy.all"] = float(np.mean(marks))

    measured = merge(sample_here(folder, captions), len(captions))
    sampled = Sampled(captions, measured.features, Statistics.of(reference))
    estimates, published = summarise("heldout", sampled, measured)
    values = metrics.values_of(estimates)
    statistics = Statistics.of(reference)
    expected["clip_kid"] = distances.kernel_distance(embedding, statistics).value
    expected["cmmd"] = distances.cmmd(embedding, statistics).value
    overlap = distances.manifold_overlap(embedding, statistics)
    expected |= {f"clip_{name}": found.value for name, found in overlap.items()}
    assert values == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert {name: values[name] for name in values if "accuracy" in name} == {
        name: expected[name] for name in expected if "accuracy" in name
    }
    alone = imaging.grid(images[:SHOWN], columns=8, marks=marks)
    assert published["heldout"] == imaging.png(alone), "captions of rows are in previews alone"
    grid = imaging.grid(images[:SHOWN], columns=8, captions=captions[:SHOWN], marks=marks)
    assert grid_of(measured, captions) == imaging.png(grid) == summarise("unseen", sampled, measured)[1]["unseen"]
    assert set(published) == {"heldout"} | ({"confusion_heldout"} if captions is CAPTIONS else set())
    starts = range(0, len(captions), BATCH)
    assert measured.digests == [files.sha256(pixels[start : start + BATCH].tobytes()) for start in starts]


def test_scores_of_single_images_are_in_order_and_null_where_there_are_none(folders: dict[int, Path]) -> None:
    groups = {"heldout": CAPTIONS[:40], "mixed": MIXED}
    measured = {group: merge(sample_here(folders[8], captions), len(captions)) for group, captions in groups.items()}
    estimates = {group: metrics.measure(Sampled(groups[group], measured[group].features)) for group in groups}
    table = scores_table(groups, estimates, {"heldout": {CAPTIONS[3]: "key of 3"}})
    assert table["group"].to_pylist() == ["heldout"] * 40 + ["mixed"] * 41
    assert table["index"].to_pylist() == [*range(40), *range(41)]
    assert table["caption"].to_pylist() == [*CAPTIONS[:40], *MIXED]
    assert table["key"].to_pylist() == [None] * 3 + ["key of 3"] + [None] * 77
    names = {"group", "index", "caption", "key", "clip_score", "clip_r_precision", "accuracy.place", "accuracy.all"}
    assert names | {f"accuracy.{name}" for name in metrics.ATTRIBUTES} == set(table.column_names)
    features = measured["mixed"].features
    cosines = (features.image_embedding * features.text_embedding).sum(dim=1)
    assert table["clip_score"].to_pylist()[40:] == pytest.approx(cosines.tolist(), abs=1e-6)
    assert table["accuracy.all"].null_count == 41 and table["clip_score"].null_count == 0
    parsed = [scenes.parse_caption(caption) for caption in CAPTIONS[:40]]
    has_place = [scene is not None and scene.place is not None for scene in parsed]
    assert table["accuracy.place"].slice(0, 40).is_valid().to_pylist() == has_place
    scores = measured["heldout"].features.scenes
    assert scores is not None and table["accuracy.all"].to_pylist()[:40] == scores.all_correct()
    assert pq.read_table(io.BytesIO(tables.parquet_bytes(table))).equals(table)


def worker_of(folder: Path) -> Any:
    return SamplingWorker.__ray_metadata__.modified_class(*stack_of(folder), 5, 1)  # type: ignore[attr-defined]


@torch.no_grad()
def test_embeddings_of_a_batch_are_those_that_its_images_are_sampled_from(folders: dict[int, Path]) -> None:
    worker, captions = worker_of(folders[8]), CAPTIONS[:6]
    found = worker.sample(Batch(3, captions, 6, is_embedded=True))
    embedding = found.features.sampled_embedding
    stack = load_system(folders[8])
    assert isinstance(stack, Stack)
    generator = batch_generator(stack, 3, 5)
    assert torch.equal(embedding, stack.embed_captions(captions, stack.sampling, generator))
    images = stack.decode(embedding, stack.sampling, generator, stack.captions(captions, stack.sampling))
    assert np.array_equal(imaging.to_uint8(images), found.shown), "from these embeddings, with the same noise"
    assert worker.sample(Batch(3, captions, 6)).features.sampled_embedding is None

    pairs = torch.nn.functional.normalize(embedding + 0.1, dim=1)
    sampled = Sampled(captions, found.features, own=pairs)
    values = metrics.values_of(metrics.measure(sampled))
    expected = retrieval.score_embeddings(embedding, pairs)
    assert {name: values[f"embedding_{name}"] for name in expected} == pytest.approx(expected)
    without = metrics.measure(Sampled(captions, found.features))
    assert not [name for name in without if name.startswith("embedding_")]

    for parameter in worker.clip.model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    measured = worker.sample(Batch(3, captions, is_embedded=True))
    assert measured.features.sampled_embedding is None, "embeddings of different CLIPs cannot be compared"


def test_reconstructions_are_compared_with_their_originals(folders: dict[int, Path]) -> None:
    worker, captions = worker_of(folders[32]), CAPTIONS[:5]
    parsed = [scenes.parse_caption(caption) for caption in captions]
    pixels = [scenes.render(scene, np.random.default_rng(0), 48) for scene in parsed if scene]
    originals = [imaging.encode(image, "JPEG") for image in pixels]
    found = worker.sample(Batch(2, captions, 5, originals=originals))
    own = load_images(originals, 32)
    stack = load_system(folders[32])
    assert isinstance(stack, Stack)
    images = stack.reconstruct(own, stack.sampling, batch_generator(stack, 2, 5))
    assert np.array_equal(imaging.to_uint8(images), found.shown)
    assert not np.array_equal(found.shown, worker.sample(Batch(2, captions, 5)).shown)
    embedding = stack.embed_images(own)
    values = metrics.values_of(metrics.measure(Sampled(captions, found.features, own=embedding)))
    assert values["reconstruction_l1"] == pytest.approx((images - own).abs().mean().item(), rel=1e-4)
    cosine = (found.features.image_embedding * embedding).sum(dim=1).mean().item()
    assert values["reconstruction_cosine"] == pytest.approx(cosine, rel=1e-4)
    same = found.features._replace(image_embedding=embedding, difference=torch.zeros(5))
    values = metrics.values_of(metrics.measure(Sampled(captions, same, own=embedding)))
    assert values["reconstruction_l1"] == 0 and values["reconstruction_cosine"] == pytest.approx(1)


def test_bits_per_dim_are_read_from_the_parts_that_measured_them(tmp_path: Path) -> None:
    numbers = {"bits_per_dim": torch.tensor(3.5), "scores": torch.ones(4)}
    checkpoints.save(str(tmp_path / "a"), {"model": {}, "measured": numbers}, {})
    checkpoints.save(str(tmp_path / "b"), {"model": {}, "measured": {"scores": torch.ones(4)}}, {})
    checkpoints.save(str(tmp_path / "c"), {"model": {}}, {})
    assert bits_per_dim(StackFiles("ddpm", {name: str(tmp_path / name) for name in "abc"})) == {"a": 3.5}


@torch.no_grad()
def test_inception_measures_sampled_and_stored_images_alike(
    folders: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights, whose digest is taken for the right one."""
    torch.save(inception.build().state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr(inception, "DIGEST", files.digest(str(tmp_path / "weights.pth")))
    weights = str(tmp_path / "weights.pth")
    worker = SamplingWorker.__ray_metadata__.modified_class(*stack_of(folders[8]), 5, 1, weights)  # type: ignore[attr-defined]
    found = worker.sample(Batch(0, CAPTIONS[:2], 2))
    model = inception.load_inception(weights)
    expected = model(inception.prepare(imaging.from_uint8(found.shown)))
    torch.testing.assert_close(found.features.inception, expected, rtol=1e-3, atol=1e-4)

    originals = [imaging.encode(np.full((16, 16, 3), value, np.uint8), "JPEG") for value in (10, 200)]
    measuring = InceptionWorker.__ray_metadata__.modified_class(weights, 8, 1)  # type: ignore[attr-defined]
    expected = model(inception.prepare(load_images(originals, 8)))
    torch.testing.assert_close(measuring.measure(originals), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["prompts", "inception"])
def test_files_that_settings_name_are_checked_before_a_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").write_text("a red circle\n")

    def pinned(**values: Any) -> Any:
        assert evaluate.pin is not None
        pipeline = types.SimpleNamespace(system="unclip")
        return evaluate.pin(EvaluateConfig(**values), Pinning(Store(str(tmp_path / "storage")), pipeline))

    assert pinned().prompts_sha256 is None and pinned().system == "unclip"
    with pytest.raises(InputError, match="cannot be read"):
        pinned(**{name: str(tmp_path / "missing")})
    with pytest.raises(ConfigError, match=r"evaluate.system: got 'glide'"):
        pinned(system="glide")
    if name == "inception":
        with pytest.raises(InputError, match=r"expected 6726825d"):
            pinned(inception=str(tmp_path / "file.txt"))
        return
    path = os.path.relpath(tmp_path / "file.txt")
    config = pinned(prompts=path)
    digest = files.digest(str(tmp_path / "file.txt"))
    assert (config.prompts, config.prompts_sha256) == (str(tmp_path / "file.txt"), digest)
    assert pinned(prompts=path, prompts_sha256=digest) == config
    with pytest.raises(ConfigError, match="prompts_sha256"):
        pinned(prompts=path, prompts_sha256="0" * 64)


@pytest.mark.slow  # workers import torch and CLIP anew
def test_a_killed_worker_is_restarted_and_changes_no_result(
    cluster: None, folders: dict[int, Path], tmp_path: Path
) -> None:
    groups = {"heldout": CAPTIONS, "unseen": MIXED}
    progress = Progress(str(tmp_path / "evaluate.json"), len(CAPTIONS) + len(MIXED), "images")
    given = (groups, *stack_of(folders[8]), Scoring(0, BATCH, SHOWN), Resources(num_workers=2, cpus_per_worker=1))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        sampling = pool.submit(sample_groups, *given, progress)
        while not (found := workers_that_sample()) and not sampling.done():
            time.sleep(0.01)
        assert found, "sampling ended before a worker was seen"
        os.kill(found[0], signal.SIGKILL)
        results = sampling.result()
    assert not Path(f"/proc/{found[0]}").exists()
    assert list(results) == list(groups)
    for group, captions in groups.items():
        expected = merge(sample_here(folders[8], captions), len(captions))
        assert results[group].digests == expected.digests
        assert np.array_equal(results[group].shown, expected.shown)
        for name in ("image_embedding", "text_embedding"):
            torch.testing.assert_close(
                getattr(results[group].features, name), getattr(expected.features, name), rtol=0, atol=1e-6
            )
    estimates = {
        group: metrics.measure(Sampled(captions, results[group].features)) for group, captions in groups.items()
    }
    table = scores_table(groups, estimates)
    assert table.num_rows == len(CAPTIONS) + len(MIXED) and table["key"].null_count == table.num_rows
    features = results["heldout"].features
    scores = (features.image_embedding * features.text_embedding).sum(dim=1)
    assert table["clip_score"].to_pylist()[: len(CAPTIONS)] == pytest.approx(scores.tolist(), abs=1e-5)
    assert results["unseen"].features.scenes is None and results["heldout"].features.scenes is not None
    shown = json.loads((tmp_path / "evaluate.json").read_text())
    assert shown["done"] == shown["total"] == len(CAPTIONS) + len(MIXED) and shown["unit"] == "images"


def workers_that_sample() -> list[int]:
    """Ids of processes below this one that are sampling a batch."""
    parents, sampling = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::SamplingWorker.sample"):
                sampling.append(int(folder.name))

    def is_below(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and is_below(parents[pid]))

    return [pid for pid in sampling if is_below(pid)]


def test_a_grid_without_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_images: got 0, expected at least 1"):
        Config(num_images=0)


def test_captions_by_group() -> None:
    heldout = ["a small red circle on the left on white", "a small red circle on white", "a large blue star on black"]
    config = EvaluateConfig(num_captions=2, num_unseen=3, num_relations=40, num_repeated=1, num_repeats=4, num_kept=2)
    groups = caption_groups(config, heldout)
    assert {name: len(captions) for name, captions in groups.items()} == {
        "heldout": 2,
        "unseen": 3,
        "relations": 40,
        "repeated": 4,
    }
    assert groups["heldout"] == heldout[:2] and groups["repeated"] == heldout[1:2] * 4
    parsed = [scenes.parse_caption(caption) for caption in groups["relations"]]
    pairs = {(each.shape, each.colour) for scene in parsed if scene for each in scene.objects}
    assert all(scene and scene.relation for scene in parsed) and len(set(groups["relations"])) > 30
    assert len(pairs) > 10 and not pairs & scenes.UNSEEN, "objects that were seen, in relations that were not"
    assert set(caption_groups(EvaluateConfig(), heldout)) == {"heldout"}
    photographs = ["a harbour", "a red house"]
    assert caption_groups(config, photographs)["repeated"] == ["a harbour"] * 4
    for setting, value in (("num_kept", 49), ("num_repeats", 1), ("num_relations", -1), ("num_repeated", -1)):
        with pytest.raises(ConfigError, match=f"{setting}: got {value}"):
            EvaluateConfig(**{setting: value})


def test_settings_of_a_comparison_leave_finished_evaluations_as_they_are() -> None:
    names = {"num_relations", "num_repeated", "num_repeats", "num_kept"}
    assert not names & without_operational(EvaluateConfig()).keys()
    assert (
        names - {"num_repeats"}
        <= without_operational(EvaluateConfig(num_relations=1, num_repeated=1, num_kept=1)).keys()
    )
