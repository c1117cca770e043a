"""Estimates of hours, bytes and cost: closed forms, rates that a storage measured, and the command."""

import dataclasses
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pytest

from pipelines.commands.estimate import COLUMNS, parse_sizes
from pipelines.commands.estimate import estimate as command
from pipelines.config import load
from pipelines.dataset import PipelineConfig
from pipelines.estimate import (
    EncodingWork,
    Estimate,
    Machine,
    Measured,
    Measurement,
    Prices,
    StageEstimate,
    TrainingWork,
    Workload,
    divide,
    estimate,
    waves,
)
from pipelines.measured import measure
from pipelines.quantities import hours, number, parse_number, size
from pipelines.records import close_run, open_run, record_cluster
from pipelines.workload import workload
from tasks import tables
from tasks.stage import Artifact, Run
from tasks.store import Store
from tests.pipelines.command_line import call, call_json
from unclip.errors import ConfigError
from unclip.models import clip as clip_models
from unclip.training.memory import count
from unclip.training.memory import measure as measure_memory
from unclip.training.settings import TrainerConfig

FIRST = TrainingWork("first", 1_000_000, 256, 2e12, 1_000, 2, ("tokens", "image_embedding"))
SECOND = TrainingWork("second", 1_000_000, 256, 6e12, 3_000, 2, ("jpg",))
WORK = Workload(
    image_size=256,
    chroma_subsampling="4:2:0",
    embedding_dim=768,
    clip_flops=4e12,
    clip_parameters=500,
    holdout=0.5,
    trainings=(FIRST, SECOND),
    num_captions=100,
    caption_flops=8e14,
    sampling_batch=50,
)
MACHINE = Machine(gpus=4, cpus=100, gpu_flops=1e14)


def by_stage(found: Estimate) -> dict[str, StageEstimate]:
    return {stage.stage: stage for stage in found.stages}


def seconds(found: Estimate) -> dict[str, float]:
    return {stage.stage: 3600 * stage.hours for stage in found.stages}


def test_hours_follow_from_the_shipped_rates() -> None:
    found = estimate(WORK, 1_000_000, MACHINE)
    rows = {stage.stage: (stage.rows_in, stage.rows_out) for stage in found.stages}
    assert rows == {
        "ingest": (1_000_000, 980_000),
        "download": (980_000, 833_000),
        "filter": (833_000, 791_350),
        "dedup": (791_350, 712_215),
        "embed": (712_215, 712_215),
        "curate": (712_215, 712_215),
        "report": (712_215, None),
        "first": (356_108, None),
        "second": (356_108, None),
        "evaluate": (100, None),
        "publish": (0, None),
    }
    expected = {
        "ingest": 1_000_000 / 15_000_000,
        "download": 980_000 / 5_900,
        "filter": 833_000 / 13_000_000,
        "dedup": 791_350 / 14_000_000,
        "embed": 7_122.15,  # 712,215 x 4e12 / 4e14
        "curate": 712_215 / 4_000_000,
        "report": 712_215 / 13_000_000,
        "first": 20_000,  # 1e6 x 2e12 on one of four GPUs
        "second": 20_000,  # 1e6 x 6e12 on three
        "evaluate": 400,  # 100 x 8e14 on two GPUs, in batches of 50
        "publish": 0,
    }
    assert seconds(found) == pytest.approx(expected)
    assert 3600 * found.hours == pytest.approx(sum(expected.values()) - expected["report"] - 20_000)
    devices = {stage.stage: (stage.gpus, stage.cpus) for stage in found.stages}
    assert devices["download"] == (0, 100) and devices["embed"] == (4, 0)
    assert (devices["first"], devices["second"], devices["evaluate"]) == ((1, 0), (3, 0), (2, 0))


def test_bytes_follow_from_the_shipped_sizes() -> None:
    stages = by_stage(estimate(WORK, 1_000_000, MACHINE))
    stored = {name: stage.stored_bytes for name, stage in stages.items()}
    assert stored == {
        "ingest": 150_000_000,
        "download": 833_000 * 30_000 + 980_000 * 150,
        "filter": 833_000 * 30,
        "dedup": 791_350 * 30,
        "embed": 712_215 * (2 * 768 * 4 + 130),
        "curate": 712_215 * 60,
        "report": 0,
        "first": 9 * 4 * 1_000,  # two checkpoints of four values, and the weights
        "second": 9 * 4 * 3_000,
        "evaluate": 0,
        "publish": 4 * 4_500,
    }
    assert stages["download"].network_bytes == 833_000 * 130_000 + 980_000 * 150
    assert stages["first"].network_bytes == 1_000_000 * (40 + 4 * 768)
    image_bytes = stored["download"] / 833_000
    assert stages["embed"].network_bytes == pytest.approx(712_215 * image_bytes)
    assert stages["second"].network_bytes == pytest.approx(1_000_000 * image_bytes)
    small = by_stage(estimate(dataclasses.replace(WORK, image_size=64), 1_000_000, MACHINE))
    assert small["download"].stored_bytes == 833_000 * 30_000 / 16 + 980_000 * 150
    full_colour = by_stage(estimate(dataclasses.replace(WORK, chroma_subsampling="4:4:4"), 1_000_000, MACHINE))
    assert full_colour["download"].stored_bytes == round(833_000 * 30_000 / 0.7 + 980_000 * 150)


def test_costs_are_those_of_the_work_and_of_a_month_of_storage() -> None:
    assert estimate(WORK, 1_000_000, MACHINE).cost is None
    found = estimate(WORK, 1_000_000, MACHINE, prices=Prices(gpu_hour=2, cpu_hour=0.1, terabyte_month=20))
    stages = by_stage(found)
    assert stages["embed"].cost == pytest.approx(7_122.15 / 3600 * 4 * 2 + 712_215 * 6_274 / 1e12 * 20)
    assert stages["download"].cost == pytest.approx(980_000 / 5_900 / 3600 * 100 * 0.1 + 25.137e9 / 1e12 * 20)
    assert stages["second"].cost == pytest.approx(20_000 / 3600 * 3 * 2 + 108_000 / 1e12 * 20)
    assert found.cost == pytest.approx(sum(stage.cost or 0 for stage in found.stages))
    only_gpus = by_stage(estimate(WORK, 1_000_000, MACHINE, prices=Prices(gpu_hour=2)))
    assert only_gpus["download"].cost == 0 and only_gpus["embed"].cost == pytest.approx(7_122.15 / 3600 * 8)


def test_cpus_that_decode_too_slowly_hold_gpus_back() -> None:
    slow = Machine(gpus=4, cpus=1, gpu_flops=1e14)
    work = dataclasses.replace(WORK, clip_flops=1e9)
    decoding = 712_215 * (1 / 2_164 + 0.75e-3)
    found = estimate(work, 1_000_000, slow)
    assert seconds(found)["embed"] == pytest.approx(decoding) and "GPUs wait" in by_stage(found)["embed"].how
    plenty = estimate(work, 1_000_000, Machine(gpus=4, cpus=1_000_000, gpu_flops=1e14))
    assert seconds(plenty)["embed"] == pytest.approx(712_215 * 1e9 / 4e14)
    assert "CPUs keep up" in by_stage(plenty)["embed"].how
    on_cpus = estimate(work, 1_000_000, Machine(gpus=0, cpus=10))
    assert seconds(on_cpus)["embed"] == pytest.approx(712_215 * 1e9 / (10 * 100e9) + decoding / 10)
    assert by_stage(on_cpus)["embed"].cpus == 10


def test_gpus_embed_in_float32_more_slowly() -> None:
    speeds = {None: 67 / 989, "embed.precision=fp32": 67 / 989, "embed.precision=bf16": 1}
    for setting, speed in speeds.items():
        counted = workload(config_of(Path("unused"), *filter(None, [setting])))
        assert counted.clip_speed == speed
        found = estimate(dataclasses.replace(WORK, clip_speed=speed), 1_000_000, MACHINE)
        assert seconds(found)["embed"] == pytest.approx(712_215 * 4e12 / 4e14 / speed)
        assert ("7% of bf16's for float32" in by_stage(found)["embed"].how) == (speed < 1)


def test_semantic_deduplication_costs_its_comparisons() -> None:
    found = estimate(dataclasses.replace(WORK, compared=8_000, num_probes=3), 1_000_000, MACHINE)
    assert seconds(found)["curate"] == pytest.approx(712_215 * (1 / 40_000 + 8_000 * 2 * 768 / 100e9) / 100)
    assert by_stage(found)["curate"].stored_bytes == 712_215 * 72


def test_a_clip_is_trained_before_it_embeds() -> None:
    clip = TrainingWork("clip", 500_000, 256, 3e12, 1_000, 2, ("caption", "jpg"), num_models=2)
    found = estimate(dataclasses.replace(WORK, clip_training=clip), 1_000_000, MACHINE)
    assert [stage.stage for stage in found.stages][3:6] == ["dedup", "clip", "embed"]
    assert seconds(found)["clip"] == pytest.approx(500_000 * 3e12 / 4e14)
    assert by_stage(found)["clip"].stored_bytes == 10 * 4 * 1_000
    assert found.hours - estimate(WORK, 1_000_000, MACHINE).hours == pytest.approx(3_750 / 3600)


def test_trainings_wait_for_those_that_they_need_and_for_gpus() -> None:
    third = dataclasses.replace(FIRST, name="third", after=("second",))
    trainings = (FIRST, SECOND, third)
    assert [[work.name for work in wave] for wave in waves(trainings)] == [["first", "second"], ["third"]]
    found = estimate(dataclasses.replace(WORK, trainings=trainings), 1_000_000, MACHINE)
    assert seconds(found)["third"] == pytest.approx(5_000)  # on all four GPUs
    assert found.hours - estimate(WORK, 1_000_000, MACHINE).hours == pytest.approx(5_000 / 3600)
    alone = estimate(WORK, 1_000_000, dataclasses.replace(MACHINE, gpus=1))
    assert (seconds(alone)["first"], seconds(alone)["second"]) == pytest.approx((20_000, 60_000))
    assert "one after another on 1 GPU" in alone.how and "side by side on 4 GPUs" in found.how
    assert divide(10, [1.0, 3.0], [256, 256]) == [3, 7] and divide(10, [1.0, 3.0], [256, 4]) == [6, 4]
    assert divide(10, [1.0, 1.0], [2, 3]) == [2, 3]


LATENTS = EncodingWork(
    "latents", "images", 2e11, "jpg", "latent", 8_192, "4,096 numbers x 2 B", speed=0.5, after=("second",)
)
GENERATOR = TrainingWork("generator", 1_000_000, 256, 4e12, 1_000, 2, ("tokens", "latent"), ("second", "latents"))
STATES = EncodingWork("text_states", "captions", 1e12, "caption", "states", 30_720, "20 tokens", speed=0.1)


def test_images_are_encoded_between_the_trainings_of_autoencoder_and_generator() -> None:
    work = dataclasses.replace(WORK, trainings=(FIRST, SECOND, GENERATOR), encodings=(LATENTS,))
    assert [[each.name for each in wave] for wave in waves(work.works)] == [
        ["first", "second"],
        ["latents"],
        ["generator"],
    ]
    found = estimate(work, 1_000_000, MACHINE, prices=Prices(gpu_hour=2, terabyte_month=20))
    assert [stage.stage for stage in found.stages][7:11] == ["first", "second", "latents", "generator"]
    each = by_stage(found)
    assert (each["latents"].rows_in, each["latents"].rows_out, each["latents"].gpus) == (712_215, None, 4)
    assert seconds(found)["latents"] == pytest.approx(712.215)  # 712,215 x 2e11 / (4 x half of 1e14)
    assert seconds(found)["generator"] == pytest.approx(10_000)  # on all four GPUs
    assert found.hours - estimate(WORK, 1_000_000, MACHINE).hours == pytest.approx(10_712.215 / 3600)
    assert "0.2 h of encoding" in found.how and "50% of bf16's for float32" in each["latents"].how
    image_bytes = each["download"].stored_bytes / 833_000
    assert each["latents"].stored_bytes == 712_215 * 8_222
    assert each["latents"].network_bytes == pytest.approx(712_215 * image_bytes)
    assert each["generator"].network_bytes == 1_000_000 * (40 + 8_192)
    assert each["latents"].cost == pytest.approx(712.215 / 3600 * 8 + 712_215 * 8_222 / 1e12 * 20)
    small = dataclasses.replace(work, encodings=(dataclasses.replace(LATENTS, flops=1e9),))
    slow = estimate(small, 1_000_000, dataclasses.replace(MACHINE, cpus=1))
    assert seconds(slow)["latents"] == pytest.approx(712_215 / 2_164)
    on_cpus = estimate(work, 1_000_000, Machine(gpus=0, cpus=10))
    assert seconds(on_cpus)["latents"] == pytest.approx(712_215 * (2e11 / 1e12 + 1 / 2_164 / 10))


def test_captions_are_encoded_before_the_trainings_that_read_them() -> None:
    first, second = (
        dataclasses.replace(work, columns=(*work.columns, "states"), after=("text_states",)) for work in (FIRST, SECOND)
    )
    work = dataclasses.replace(WORK, trainings=(first, second), encodings=(STATES,))
    found = estimate(work, 1_000_000, MACHINE)
    assert [stage.stage for stage in found.stages][6:10] == ["report", "text_states", "first", "second"]
    each = by_stage(found)
    assert seconds(found)["text_states"] == pytest.approx(17_805.375)  # 712,215 x 1e12 / (4 x a tenth of 1e14)
    assert found.hours - estimate(WORK, 1_000_000, MACHINE).hours == pytest.approx(17_805.375 / 3600)
    assert (each["first"].gpus, each["second"].gpus) == (1, 3)
    assert (each["text_states"].stored_bytes, each["text_states"].network_bytes) == (712_215 * 30_750, 712_215 * 60)
    assert each["first"].network_bytes == 1_000_000 * (40 + 4 * 768 + 30_720)
    measured = Measured({"text_states": Measurement(10_000, 100, workers=2, row_bytes=20_000)})
    found = estimate(work, 1_000_000, MACHINE, measured)
    assert seconds(found)["text_states"] == pytest.approx(712_215 / (4 * 50))
    assert by_stage(found)["text_states"].stored_bytes == 712_215 * 20_000
    assert by_stage(found)["first"].network_bytes == 1_000_000 * (40 + 4 * 768 + 20_000)


def test_measured_rates_shares_and_sizes_replace_the_shipped_ones() -> None:
    stages = {
        "download": Measurement(10_000, 100, workers=20, row_bytes=1_000),
        "embed": Measurement(9_000, 90, workers=2, row_bytes=7_000),
        "second": Measurement(50_000, 1_000, workers=5),
    }
    measured = Measured(stages, {"ingest": 0.5, "download": 0.8}, image_size=64, ignored={"dedup": "it is too short"})
    found = estimate(WORK, 1_000_000, MACHINE, measured)
    each = by_stage(found)
    assert (each["download"].rows_in, each["filter"].rows_in) == (500_000, 400_000)
    assert each["filter"].rows_out == 400_000 * 0.95
    assert seconds(found)["download"] == pytest.approx(500_000 / (100 * 5))
    assert each["download"].stored_bytes == 500_000 * 1_000 * 16  # 256 pixels instead of 64
    assert seconds(found)["embed"] == pytest.approx(each["embed"].rows_in / (4 * 50))
    assert each["embed"].stored_bytes == each["embed"].rows_in * 7_000
    assert each["embed"].network_bytes == each["embed"].rows_in * 20_000
    assert seconds(found)["second"] == pytest.approx(1_000_000 / (3 * 10))
    assert {name for name, stage in each.items() if stage.is_measured} == set(stages)
    assert "measured: 10,000 rows in 100 s on 20 CPUs" in each["download"].how
    assert "keeps 80.0%, measured" in each["download"].how and "keeps 95.0%, shipped" in each["filter"].how
    assert "at 64 px x (256/64)^2" in each["download"].how and "shipped, as it is too short" in each["dedup"].how


@pytest.mark.parametrize(
    ("text", "value"), [("650000", 650_000), ("1k", 1e3), ("1.5M", 1.5e6), ("2G", 2e9), ("400T", 4e14), (" 7 ", 7)]
)
def test_numbers_with_suffixes(text: str, value: float) -> None:
    assert parse_number(text, "--pairs") == value


@pytest.mark.parametrize("text", ["", "0", "-1", "1m", "1 M", "M", "1e6", "1,5M", "lots", "inf"])
def test_other_numbers_are_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_number(text, "--gpu-flops")
    assert str(refused.value).startswith(f"--gpu-flops: got {text!r}, expected a positive number such as")


def test_several_numbers_of_pairs() -> None:
    assert parse_sizes(("10M,1M", "0.65G", "1M")) == [1_000_000, 10_000_000, 650_000_000] and parse_sizes(()) == []
    for texts, named in ((("1M,,2M",), "''"), (("1M", "2x"), "'2x'"), (("1.5",), "'1.5'")):
        with pytest.raises(ConfigError, match=f"--pairs: got {named}, expected"):
            parse_sizes(texts)


def test_formats() -> None:
    assert [number(value) for value in (0, 0.0123, 7.5, 1_234, 26_000, 6.5e8, 1.64e9, 4e14)] == [
        "0", "0.0123", "7.5", "1,234", "26k", "650M", "1.64G", "400T",
    ]  # fmt: skip
    assert [size(value) for value in (150, 42_900, 1.234e12, 5e15)] == ["150 B", "42.9 kB", "1.23 TB", "5 PB"]
    assert [hours(value) for value in (0.0456, 1, 23.45, 1_234.5)] == ["0.046", "1.0", "23.4", "1,234"]


def config_of(storage: Path, *assignments: str) -> PipelineConfig:
    return load("demo", None, ("ingest.urls=unknown", *assignments), str(storage))


def past_run(
    config: PipelineConfig,
    artifacts: Mapping[str, tuple[float, dict[str, Any]]],
    cluster: dict[str, float] | None = None,
    state: str = "done",
) -> Run:
    """Record a run whose stages took so many seconds and have these facts, in the formats of runs and stages."""
    store = Store(config.storage)
    run = open_run("demo", config, store)
    if cluster is not None:
        record_cluster(run, store, cluster)
    for name, (took, facts) in artifacts.items():
        artifact = Artifact(name, f"{name}-fingerprint", "/elsewhere/file", "digest", facts, took)
        store.write_json(dataclasses.asdict(artifact), "stages", name, f"{artifact.fingerprint}.json")
        event = {"stage": name, "at": 0.0, "state": state, "fingerprint": artifact.fingerprint, "seconds": took}
        store.write_json(event, "runs", run.id, f"{name}.json")
    close_run(run, store, "done")
    return run


def counts(kept: int) -> dict[str, Any]:
    return {"rows": {"in": 100_000, "kept": kept, "dropped": 100_000 - kept, "failed": 0}, "reasons": {}}


FINISHED: dict[str, tuple[float, dict[str, Any]]] = {
    "ingest": (0.5, counts(90_000)),
    "download": (600.0, counts(60_000) | {"fetched_now": 90_000, "images_recipe": "recipe"}),
    "filter": (5.0, counts(54_000)),
    "dedup": (9.0, counts(27_000)),
    "embed": (135.0, counts(27_000) | {"embedded_now": 27_000, "embeddings": "/elsewhere/embeddings/clip"}),
    "curate": (3.0, counts(27_000)),
    "report": (10.0, {}),
    "decoder": (1_000.0, {"samples_seen": 46_000}),
    "evaluate": (60.0, {"captions": {"heldout": 256, "unseen": 128}}),
}
CLUSTER = {"CPU": 12.0, "GPU": 0.0, "memory": 1e9}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """Settings of a storage with a finished run on a cluster of 12 CPUs; read only."""
    config = config_of(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        past_run(config, FINISHED, CLUSTER)
    table = pa.table({"key": [f"{index:032d}" for index in range(500)], "jpg": [bytes(100)] * 500})
    for uri in (f"{config.storage}/images/recipe", f"{config.storage}/embeddings/clip"):
        tables.append_files(uri, [tables.write_part(uri, "part", table)], table.schema)
    Path(config.storage, "artifacts", "filter", "filter-fingerprint").mkdir(parents=True)
    Path(config.storage, "artifacts", "filter", "filter-fingerprint", "part").write_bytes(bytes(120_000))
    return config


def test_rates_come_from_the_storage(finished: PipelineConfig) -> None:
    measured = measure(Store(finished.storage), finished, on_gpus=False)
    rates = {name: (found.rows, found.seconds, found.workers) for name, found in measured.stages.items()}
    assert rates == {
        "download": (90_000, 600, 12),
        "filter": (60_000, 5, 12),
        "dedup": (54_000, 9, 12),
        "embed": (27_000, 135, 2),  # the demo embeds and evaluates on two workers, and its decoder has two CPUs
        "curate": (27_000, 3, 12),
        "report": (27_000, 10, 12),
        "decoder": (46_000, 1_000, 2),
        "evaluate": (384, 60, 2),
    }
    assert measured.ignored == {"ingest": "100,000 rows in 0.5 s are too few to measure"}
    assert measured.shares == pytest.approx(
        {"ingest": 0.9, "download": 2 / 3, "filter": 0.9, "dedup": 0.5, "embed": 1, "curate": 1}
    )
    [part] = Path(finished.storage, "images", "recipe").glob("*.parquet")
    assert measured.stages["download"].row_bytes == part.stat().st_size / 500
    assert (measured.image_size, measured.stages["filter"].row_bytes) == (64, 2)


def test_only_comparable_work_is_measured(finished: PipelineConfig, tmp_path: Path) -> None:
    store = Store(finished.storage)
    on_gpus = measure(store, finished, on_gpus=True)
    assert on_gpus.ignored["embed"] == on_gpus.ignored["decoder"] == "this storage measured it on CPUs"
    assert "download" in on_gpus.stages
    wider = measure(store, config_of(Path(finished.storage), "decoder.model.unet.channels=64"), on_gpus=False)
    assert "with other models" in wider.ignored["decoder"] and "with other models" in wider.ignored["evaluate"]
    assert "embed" in wider.stages
    longer = measure(store, config_of(Path(finished.storage), "decoder.trainer.num_samples=1000000"), on_gpus=False)
    assert "decoder" in longer.stages
    other_clip = measure(store, config_of(Path(finished.storage), "clip.model=ViT-B-32"), on_gpus=False)
    assert {"embed", "decoder", "evaluate"} <= other_clip.ignored.keys() and "dedup" in other_clip.stages
    coarse = measure(store, config_of(Path(finished.storage), "download.jpeg_quality=80"), on_gpus=False)
    assert coarse.image_size is None and "download" in coarse.stages
    assert measure(Store(str(tmp_path / "none")), finished, on_gpus=False) == Measured()


def test_interrupted_cached_and_unplaced_work_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = config_of(tmp_path)
    store = Store(config.storage)
    past_run(config, {"dedup": FINISHED["dedup"], "filter": FINISHED["filter"]}, CLUSTER, state="failed")
    past_run(config, FINISHED, CLUSTER)
    resumed = measure(store, config, on_gpus=False)
    assert "filter" not in resumed.stages and "dedup" not in resumed.stages and "curate" in resumed.stages
    past_run(config, FINISHED, CLUSTER, state="cached")
    assert measure(store, config, on_gpus=False) == resumed
    elsewhere = config_of(tmp_path / "other")
    past_run(elsewhere, FINISHED)  # as `unclip train` does, which uses no cluster
    found = measure(Store(elsewhere.storage), elsewhere, on_gpus=False)
    assert not found.stages and found.shares["dedup"] == 0.5


def test_flops_are_those_of_the_memory_plan_and_of_open_clip() -> None:
    config = config_of(Path("unused"))
    found = workload(config)
    assert [work.name for work in found.trainings] == ["prior", "decoder", "upsampler-64"]
    decoder = found.trainings[1]
    assert (decoder.parameters, decoder.num_samples, decoder.batch_size) == (3_335_715, 30_000, 16)
    assert "jpg" in decoder.columns and decoder.after == ()
    assert found.clip_training is not None and found.clip_training.parameters == 6_304_857
    sampling = (16 * 2 * (1 + (config.evaluate.sampling.prior.guidance_scale != 1)), 15 * 2, 4)  # type: ignore[attr-defined]
    each = [work.flops_per_sample / 3 for work in found.trainings]
    upsampler = config.evaluate.sampling.upsamplers["64"].guidance_scale  # type: ignore[attr-defined]
    passes = (sampling[0], sampling[1], sampling[2] * (1 + (upsampler != 1)))
    assert found.caption_flops == pytest.approx(sum(a * b for a, b in zip(passes, each, strict=True)))
    large = workload(config_of(Path("unused"), "clip.model=ViT-L-14", "clip.pretrained=openai"))
    assert large.clip_training is None and large.embedding_dim == 768
    assert large.clip_flops == pytest.approx(175.3e9, rel=1e-3)  # open_clip's model_profile.csv: 175.33 GFLOP
    assert large.clip_parameters == 427_616_513


def test_flops_and_bytes_of_encodings_follow_from_their_models() -> None:
    latent = workload(config_of(Path("unused"), "system=latent_diffusion"))
    [found] = latent.encodings
    # 16 x 16 positions: 48 channels of patches to 64, six convolutions of 64, 64 to 8, and one of 1 x 1
    per_position = 2 * 9 * (48 * 64 + 6 * 64 * 64 + 64 * 8) + 2 * 8 * 8
    assert (found.flops, found.value_bytes, found.stores) == (256 * per_position, 16 * 16 * 4 * 2, "latent")
    assert [work.after for work in latent.trainings] == [(), ("autoencoder", "latents")]
    [codes] = workload(config_of(Path("unused"), "system=dalle")).encodings
    assert codes.value_bytes == pytest.approx(8 * 8 * 2.3) and (codes.stores, codes.reads) == ("codes", "jpg")

    imagen = workload(config_of(Path("unused"), "system=imagen"))
    [states] = imagen.encodings
    assert (states.value_bytes, states.after, states.unit) == (20 * 96 * 2, (), "captions of 24 tokens")
    assert [work.after for work in imagen.trainings] == [("text_states",), ("text_states",)]
    t5 = ("system=imagen", "text_encoder.name=hf-hub:google/t5-v1_1-xxl")
    [states] = workload(config_of(Path("unused"), *t5, "text_encoder.width=4096")).encodings
    per_token = 2 * (4 * 4096**2 + 3 * 4096 * 10_240) + 4 * 128 * 4096  # gated layers; queries and values of 128 tokens
    assert (states.flops, states.value_bytes) == (24 * 128 * per_token, 20 * 4096 * 2)
    with pytest.raises(ConfigError, match=r"text_encoder\.width: got 1000, expected 512, 768"):
        workload(config_of(Path("unused"), *t5, "text_encoder.width=1000"))
    assert workload(config_of(Path("unused"))).encodings == ()


@pytest.mark.parametrize(
    ("system", "name", "facts", "other"),
    [
        ("latent_diffusion", "latents", {"encoded_now": 27_000}, "latents.precision=bf16"),
        ("imagen", "text_states", {"derived_now": 27_000}, "clip.model=ViT-B-32"),
    ],
)
def test_encodings_are_measured(
    system: str, name: str, facts: dict[str, Any], other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = config_of(tmp_path, f"system={system}")
    table = pa.table({"key": [f"{index:032d}" for index in range(500)]})
    uri = f"{config.storage}/derived/{name}-digest"
    tables.append_files(uri, [tables.write_part(uri, "part", table)], table.schema)
    past_run(config, {name: (135.0, facts | {"derived": f"/elsewhere/derived/{name}-digest"})}, CLUSTER)
    found = measure(Store(config.storage), config, on_gpus=False).stages[name]
    [part] = Path(uri).glob("*.parquet")
    assert found == Measurement(27_000, 135, workers=1, row_bytes=part.stat().st_size / 500)
    changed = measure(Store(config.storage), config_of(tmp_path, f"system={system}", other), on_gpus=False)
    assert "with other models or settings" in changed.ignored[name]


def test_counting_agrees_with_measuring() -> None:
    from unclip.models.text import TextShape
    from unclip.systems.part import Shapes
    from unclip.systems.upsampler import UPSAMPLER, UpsamplerStageConfig

    config = UpsamplerStageConfig(trainer=TrainerConfig())
    network = UPSAMPLER.network(config, Shapes(512, TextShape(77, 512, 49_408)))
    measured = measure_memory("any", network)
    assert count(network) == (measured.parameters, measured.flops_per_sample)


def test_an_outline_has_no_weights_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = clip_models.outline("unclip-demo")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"} and not caplog.records
    with pytest.raises(ConfigError, match="got 'ViT-B-23', whose sizes are not in a configuration"):
        clip_models.outline("ViT-B-23")


def refused(*arguments: object) -> str:
    result: subprocess.CompletedProcess[str] = call("estimate", *arguments)
    assert result.returncode == 2 and result.stdout == "", result.stdout
    return result.stderr


def test_the_command_prints_a_table_and_explains_every_line(finished: PipelineConfig) -> None:
    prices = ["--price-gpu-hour", 2.5, "--price-cpu-hour", 0.05, "--price-terabyte-month", 20]
    result = call("estimate", "demo", "--storage", finished.storage, "--gpus", 0, "--cpus", 64, *prices)
    assert result.returncode == 0, result.stderr
    heading, rates, *_ = result.stdout.splitlines()
    assert heading.startswith("64 CPUs.") and finished.storage in rates and "download, filter, dedup" in rates
    body, _, explained = result.stdout.partition("\n\n")[2].partition("\n\nHow, for 650M pairs:\n")
    titles, columns, *rows = body.splitlines()
    assert titles.split() == ["1M", "pairs", "10M", "pairs", "100M", "pairs", "650M", "pairs"]
    assert columns.split() == ["hours", "bytes", "cost"] * 4
    assert max(map(len, rows)) <= COLUMNS and {len(row.split()) for row in rows} == {13}
    stages = [row.split()[0] for row in rows]
    assert stages == [line.partition(":")[0] for line in explained.splitlines()] and stages[-1] == "total"
    assert "download: 585M rows / (64 CPUs x 12.5 rows/s, measured: 90,000 rows in 600 s on 12 CPUs)" in explained
    assert "ingest: 650M rows / (64 CPUs x 150k rows/s, shipped, as 100,000 rows in 0.5 s are too few" in explained
    free = call("estimate", "demo", "--storage", finished.storage, "--pairs", "1M")
    assert "cost" not in free.stdout and "embed: " in free.stdout


def test_the_estimate_as_json(finished: PipelineConfig, tmp_path: Path) -> None:
    document = call_json(
        "estimate", "demo", "--storage", finished.storage, "--gpus", 0, "--pairs", "2M", "--price-cpu-hour", 0.1
    )
    assert document["machine"] == {"gpus": 0, "cpus": 16, "gpu_flops": 4e14}
    assert document["prices"] == {"gpu_hour": 0, "cpu_hour": 0.1, "terabyte_month": 0}
    [found] = document["estimates"]
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert (found["pairs"], stages["download"]["rows_in"]) == (2_000_000, 1_800_000)
    assert stages["download"]["hours"] == pytest.approx(1_800_000 / (16 * 12.5) / 3600)
    assert stages["download"]["is_measured"] and not stages["ingest"]["is_measured"]
    run_file = tmp_path / "run.toml"
    run_file.write_text('model_size = "small"\n[download]\nimage_size = 512\n')
    document = call_json("estimate", run_file, "--pairs", "1k,2k", "--gpus", 2, "--storage", tmp_path / "none")
    assert (document["pipeline"], document["prices"], document["machine"]["cpus"]) == ("text_to_image", None, 32)
    assert [each["pairs"] for each in document["estimates"]] == [1_000, 2_000]
    assert "an image of 512 px" in document["estimates"][0]["stages"][1]["how"]
    assert not (tmp_path / "none").exists()


def test_the_command_refuses_invalid_options(tmp_path: Path) -> None:
    assert "--pairs: got '100X', expected" in refused("demo", "--pairs", "100X")
    assert "--gpu-flops: got 'fast', expected" in refused("demo", "--gpu-flops", "fast")
    for name, value in (("--gpus", "-1"), ("--cpus", "0"), ("--price-gpu-hour", "-2.0")):
        assert f"{name}: got {value}, expected" in refused("demo", name, value)
    assert "none.toml: no such run file" in refused(tmp_path / "none.toml")
    assert "Give one of them" in refused("a.toml", "--config", "b.toml")
    assert "Did you mean 'demo'?" in refused("demmo")


def test_pipelines_and_run_files_are_completed() -> None:
    [argument] = [each for each in command.params if isinstance(each, click.Argument)]

    def completed(start: str) -> list[tuple[str, str]]:
        return [(item.value, item.type) for item in argument.shell_complete(click.Context(command), start)]

    assert completed("t") == [("text_to_image", "plain"), ("tiny", "plain")]
    assert completed("run.to") == [("run.to", "file")]
