"""Comparison of systems: trained and sampled on the same rows, with the same seeds and captions.

An entry is a system, or a variant of it, with all its settings. `pipelines.side_by_side` runs the entries; the results are
collected from their artifacts, whichever run made them.

Letters: N images, S resolution.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from pipelines import dag as dags
from pipelines.config import load
from pipelines.dag import Dag, Node
from pipelines.dataset import DATASET_STAGE, DatasetResources, PipelineConfig
from pipelines.pipeline import Variant, compose, find_pipeline
from pipelines.prepare import prepare
from pipelines.preset import full_system_name, system_names
from pipelines.real_images import measure_real_images
from tasks.stage import Artifact
from tasks.store import Store
from unclip import files
from unclip.config import fingerprint, has_setting, nearest, to_dict, without_operational
from unclip.errors import ConfigError, StageError, UnclipError
from unclip.systems.part import Shapes
from unclip.systems.system import find_system
from unclip.training.memory import Compute, count
from unclip.training.settings import TrainerConfig

Equal = Literal["samples", "flop"]
"""Quantity that is made equal for all entries: samples of the costliest part, or FLOPs of all parts."""

TOLERANCE = 0.05
"""Relative difference of FLOPs that counts as none, so that variants of little difference share their parts."""
EVALUATE = "evaluate"
REAL = "real images"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A setting that takes several values."""

    setting: str
    """Path of a setting, or a shortcut of the systems for one of their sampling settings, such as guidance_scale; of one
    system alone as systems.NAME.section.field."""
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Sweep":
        """Parse "setting=1,2,3".

        Raises:
            ConfigError: the text has another form.
        """
        setting, _, values = (part.strip() for part in text.partition("="))
        parts = tuple(dict.fromkeys(value.strip() for value in values.split(",")))
        if not setting or not all(parts):
            raise ConfigError(f"--sweep: got {text!r}, expected setting=value,value,... such as guidance_scale=1,2,4.")
        return cls(setting, parts)

    @property
    def name(self) -> str:
        """Last part of the setting."""
        return self.setting.rpartition(".")[2]

    def path(self, system: str, config_of: Callable[[str], PipelineConfig]) -> str | None:
        """Path of the setting in the configuration of a system; None if the system has no such setting or shortcut.

        Args:
            config_of: name of a system -> its configuration.
        """
        if "." in self.setting:
            path = self.setting.removeprefix(f"systems.{system}.")
            return path if has_setting(config_of(system), path) else None
        shortcut = find_system(system).shortcuts.get(self.setting)
        return None if shortcut is None else f"evaluate.sampling.{shortcut}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of a comparison."""

    name: str
    """Name of the system, for a variant with its name after a slash."""
    title: str
    """Name for people."""
    config: PipelineConfig
    value: str | None = None
    """Value of the setting that is swept."""

    @property
    def label(self) -> str:
        return label_of(self.title, self.value)


def label_of(title: str, value: str | None) -> str:
    """Name of a row for people, with the value of the setting that is swept."""
    return title if value is None else f"{title}, {value}"


class Training(NamedTuple):
    """Size of the training of one part."""

    stage: str
    num_samples: int
    flops_per_sample: float
    parameters: int

    @property
    def flops(self) -> float:
        return self.num_samples * self.flops_per_sample


@dataclasses.dataclass(frozen=True)
class Row:
    """Results of an entry."""

    name: str
    title: str
    """Name for people, without the value."""
    system: str | None
    """None for real images."""
    value: str | None
    metrics: dict[str, dict[str, float]]
    """Group of captions -> name -> value."""
    trainings: tuple[Training, ...] = ()
    training_seconds: float | None = None
    """Sum over the parts; of a training that was resumed, only the time since then."""
    seconds_per_image: float | None = None
    """Time of one worker to sample an image of a held-out caption."""
    images: np.ndarray | None = None
    """[N, S, S, 3] uint8, images of the first held-out captions."""
    correct: Sequence[bool] | None = None
    """By image: True if everything that its caption names is right; None if that is unknown."""
    intervals: Mapping[str, Mapping[str, Sequence[float]]] = dataclasses.field(default_factory=dict)
    """Group of captions -> name of a metric -> lower and upper limit of its 95 % interval."""
    bits_per_dim: float | None = None
    """Variational bound on held-out images, of the part that measured it in training."""

    @property
    def label(self) -> str:
        return label_of(self.title, self.value)

    @property
    def parameters(self) -> int | None:
        return sum(each.parameters for each in self.trainings) or None

    @property
    def num_samples(self) -> int | None:
        return sum(each.num_samples for each in self.trainings) or None

    @property
    def flops(self) -> float | None:
        return sum(each.flops for each in self.trainings) or None

    def document(self) -> dict[str, Any]:
        """JSON values."""
        values = {name: getattr(self, name) for name in ("name", "label", "system", "value", "metrics", "bits_per_dim")}
        values["intervals"] = dict(self.intervals)
        costs = {name: getattr(self, name) for name in ("training_seconds", "seconds_per_image", "parameters")}
        trainings = [{**each._asdict(), "flops": each.flops} for each in self.trainings]
        totals = {"training_samples": self.num_samples, "training_flops": self.flops}
        return {**values, **costs, **totals, "trainings": trainings}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Results of all entries that succeeded; the first row is that of the real images."""

    pipeline: str
    storage: str
    equal: Equal | None
    sweep: Sweep | None
    rows: list[Row]
    captions: list[str]
    """First held-out captions, those of the images."""
    keys: list[str]
    """Keys of the rows whose real images are shown."""
    num_captions: dict[str, int]
    """Captions by group."""
    failures: dict[str, str]
    """Label of an entry -> why it has no row."""
    artifacts: dict[str, list[str]]
    """Stage -> fingerprints of the artifacts that the rows are made of."""
    snapshot: dict[str, Any]
    """Dataset version."""


def entry_names(config_of: Callable[[str | None], PipelineConfig], sweep: Sweep | None) -> list[str]:
    """Names of all systems, that of the preset first, each followed by its default variants; without variants for a sweep.

    Args:
        config_of: name of a system, None for that of the preset -> its configuration, which says which variants apply.
    """
    names: list[str] = []
    for system in dict.fromkeys([config_of(None).system, *system_names()]):
        if sweep is not None and sweep.path(system, config_of) is None:
            continue
        names.append(system)
        if sweep is None:
            config = config_of(system)
            variants = find_pipeline(system).variants
            names += [
                f"{system}/{name}"
                for name, variant in variants.items()
                if variant.is_default and variant.applies(config)
            ]
    return names


def find_entries(
    pipeline: str,
    run_file: str | None,
    assignments: Sequence[str],
    storage: str | None,
    names: Sequence[str] = (),
    sweep: Sweep | None = None,
    equal: Equal | None = None,
) -> list[Entry]:
    """Resolve the configurations of a comparison, with one dataset for all.

    Args:
        names: systems, and variants as system/variant; empty for all that apply.
        sweep: each entry once for each of its values; systems without the setting are left out, unless they are named.
        equal: see `equalise`.

    Raises:
        ConfigError: an unknown name or setting, an invalid value, or settings of the dataset that differ.
    """

    @functools.cache
    def config_of(system: str | None) -> PipelineConfig:
        return load(pipeline, run_file, assignments, storage, system)

    found: list[Entry] = []
    for name in dict.fromkeys(map(_full_name, names or entry_names(config_of, sweep))):
        system, _, key = name.partition("/")
        variant = _find_variant(system, key) if key else Variant(system)
        for value, swept in _values(system, sweep, config_of):
            settings = [*assignments, *variant.assignments, *swept]  # a row is what its label says
            try:
                config = load(pipeline, run_file, settings, storage, system)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None
            found.append(Entry(name, variant.title, config, value))
    if not found:
        raise ConfigError(f"--sweep: got {sweep.setting if sweep else ''!r}, a setting that no system has.")
    entries = [_for_comparison(entry) for entry in found]
    check_captions(entries)
    return equalise(with_one_dataset(entries), equal)


def _full_name(name: str) -> str:
    """Name of an entry with the full name of its system, so that each has one name."""
    system, _, key = name.partition("/")
    return "/".join(filter(None, (full_system_name(system), key)))


def _find_variant(system: str, key: str) -> Variant:
    variants = find_pipeline(system).variants
    if key not in variants:
        raise ConfigError(f"--systems: got {system}/{key}, but {system} has no such variant. {nearest(key, variants)}")
    return variants[key]


def _values(
    system: str, sweep: Sweep | None, config_of: Callable[[str], PipelineConfig]
) -> Iterator[tuple[str | None, tuple[str, ...]]]:
    """Yield the values of a sweep, each with its assignment; without a sweep, none once."""
    if sweep is None:
        yield None, ()
        return
    path = sweep.path(system, config_of)
    if path is None and "." in sweep.setting:
        raise ConfigError(f"--sweep: got {sweep.setting!r}, but the system {system} has no such setting.")
    if path is None:
        known = nearest(sweep.setting, find_system(system).shortcuts)
        raise ConfigError(f"--sweep: got {sweep.setting!r}, but the system {system} has no such shortcut. {known}")
    for value in sweep.values:
        yield value, (f"{path}={value}",)


def _for_comparison(entry: Entry) -> Entry:
    """Add the groups of captions of a comparison to the evaluation; a group that it samples anyway stays as it is."""
    settings, evaluate = entry.config.comparison, entry.config.evaluate
    repeated = evaluate if evaluate.num_repeated else settings
    extended = dataclasses.replace(
        evaluate,
        num_relations=evaluate.num_relations or settings.num_relations,
        num_repeated=repeated.num_repeated,
        num_repeats=repeated.num_repeats,
        num_kept=min(settings.num_columns, evaluate.num_images),
    )
    return dataclasses.replace(
        entry, config=dataclasses.replace(entry.config, evaluate=extended, resources=_resources(entry.config))
    )


def _resources(config: PipelineConfig) -> DatasetResources:
    """Resources of an entry: those of its run, but for the CPUs of trainings if the comparison has others for them."""
    cpus, resources = config.comparison.cpus_per_worker, config.resources
    if cpus is not None:
        for stage in _parts(config):
            resources = resources.with_cpus(stage, cpus)
    return resources


CAPTIONS = ("num_captions", "num_unseen", "num_relations", "num_repeated", "num_repeats", "seed")
"""Settings of `evaluate` that say which captions are sampled, and with which noise."""


def check_captions(entries: Sequence[Entry]) -> None:
    """Check that entries sample the same captions with the same seeds; those of another value of a sweep may differ.

    Raises:
        ConfigError: they do not.
    """
    firsts: dict[str | None, Entry] = {}
    for entry in entries:
        first = firsts.setdefault(entry.value, entry)
        for name in CAPTIONS:
            found, expected = (getattr(each.config.evaluate, name) for each in (entry, first))
            if found != expected:
                raise ConfigError(
                    f"{entry.name}: evaluate.{name}: got {found}, expected {expected}, as for {first.name}, so that all are "
                    f"measured by the same images. Set evaluate.{name} for all systems, or leave one out of --systems."
                )


def with_one_dataset(entries: list[Entry]) -> list[Entry]:
    """Store images at the largest resolution that an entry needs; check that the dataset's other settings are the same.

    Raises:
        ConfigError: they differ.
    """
    largest = max(entry.config.download.image_size for entry in entries)
    resized = []
    for entry in entries:
        download = dataclasses.replace(entry.config.download, image_size=largest)
        resized.append(dataclasses.replace(entry, config=dataclasses.replace(entry.config, download=download)))
    first = _dataset_settings(resized[0])
    for entry in resized[1:]:
        for stage, settings in _dataset_settings(entry).items():
            if settings != first.get(stage):
                raise ConfigError(
                    f"{entry.name}: its settings of {stage} differ from those of {resized[0].name}, so the systems would not "
                    f"have the same rows. Set {stage} for all of them, or leave one out of --systems."
                )
    return resized


def _dataset_settings(entry: Entry) -> dict[str, Any]:
    dag = dags.up_to(compose(entry.config), DATASET_STAGE)
    return {name: without_operational(node.config) for name, node in dag.items()}


def equalise(entries: list[Entry], equal: Equal | None) -> list[Entry]:
    """Change the lengths of trainings so that each entry costs as much as the first.

    With "samples", the costliest part of an entry is trained on as many samples as that of the first; with "flop", all its parts
    together for as many FLOPs, unless they are within `TOLERANCE` of that.
    """
    return entries if equal is None else [entries[0], *(_as_long_as(entries[0], entry, equal) for entry in entries[1:])]


def _as_long_as(first: Entry, entry: Entry, equal: Equal) -> Entry:
    wanted, given = trainings(first.config), trainings(entry.config)
    if not wanted or not given:
        return entry
    lengths: dict[str, float] = {}
    if equal == "flop":
        factor = sum(each.flops for each in wanted) / sum(each.flops for each in given)
        if abs(factor - 1) > TOLERANCE:
            lengths = {each.stage: each.num_samples * factor for each in given}
    else:
        lengths[_costliest(given).stage] = _costliest(wanted).num_samples
    config, parts = entry.config, _parts(entry.config)
    for stage, num_samples in lengths.items():
        config = _with_length(config, parts[stage], num_samples)
    return dataclasses.replace(entry, config=config)


def _costliest(trainings: Sequence[Training]) -> Training:
    return max(trainings, key=lambda each: each.flops)


def _parts(config: PipelineConfig) -> dict[str, Node]:
    return {name: node for name, node in compose(config).items() if node.stage.part is not None}


def _with_length(config: PipelineConfig, node: Node, num_samples: float) -> PipelineConfig:
    """Train a part on about this many samples, in whole batches."""
    trainer = node.config.trainer
    rounded = max(1, round(num_samples / trainer.batch_size)) * trainer.batch_size
    if rounded == -(-trainer.num_samples // trainer.batch_size) * trainer.batch_size:
        return config
    # a curve to compare with has another length
    changed = dataclasses.replace(trainer, num_samples=rounded, reference_curve=None)
    return dags.with_section(config, node.section, dataclasses.replace(node.config, trainer=changed))  # type: ignore[no-any-return]


def trainings(config: PipelineConfig) -> tuple[Training, ...]:
    """Count the samples, FLOPs and parameters of each part that a pipeline trains; the frozen CLIP is not counted."""
    shapes = Shapes.of(config.clip.model)
    found = []
    for name, node in _parts(config).items():
        compute = _count(node, config.clip.model, shapes)
        found.append(Training(name, node.config.trainer.num_samples, compute.flops_per_sample, compute.parameters))
    return tuple(found)


def _count(node: Node, clip: str, shapes: Shapes) -> Compute:
    """Count a part, or return what was counted before for the same network: many entries share one."""
    assert node.stage.part is not None
    settings = to_dict(dataclasses.replace(node.config, trainer=TrainerConfig()))
    key = fingerprint(node.stage.part.name, settings, clip)
    if key not in _COUNTED:
        _COUNTED[key] = count(node.stage.part.network(node.config, shapes))
    return _COUNTED[key]


_COUNTED: dict[str, Compute] = {}
"""Networks that this process has counted, by the fingerprints of their settings."""


def collect(
    pipeline: str,
    entries: Sequence[Entry],
    failures: Mapping[str, UnclipError],
    sweep: Sweep | None,
    equal: Equal | None,
) -> Comparison:
    """Collect the results of the entries that did not fail, from their artifacts."""
    store = Store(entries[0].config.storage)
    rows: list[Row] = []
    used: dict[str, set[str]] = {}
    captions: list[str] = []
    keys: list[str] = []
    num_captions: dict[str, int] = {}
    snapshot: dict[str, Any] = {}
    for entry in entries:
        if entry.label in failures:
            continue
        dag = dags.up_to(compose(prepare(entry.config)), EVALUATE)
        artifacts = {name: state.artifact for name, state in dags.states(dag, store).items() if state.artifact}
        if EVALUATE not in artifacts:
            raise StageError(f"{entry.label}: its results are gone, as after a takedown. Run the same command again.")
        for name, artifact in artifacts.items():
            used.setdefault(name, set()).add(artifact.fingerprint)
        if not rows:
            real = measure_real_images(entry.config, artifacts["curate"], artifacts["clip"])
            rows.append(
                Row(
                    REAL,
                    REAL,
                    None,
                    None,
                    real.metrics,
                    images=real.images,
                    correct=real.correct,
                    intervals=real.intervals,
                )
            )
            captions, keys = real.captions, real.keys
            snapshot = dict(artifacts["curate"].facts["snapshot"])
            num_captions = dict(artifacts[EVALUATE].facts["captions"])
        rows.append(_row(entry, dag, artifacts))
    told = {label: str(error) for label, error in failures.items()}
    fingerprints = {name: sorted(found) for name, found in used.items()}
    return Comparison(
        pipeline, store.root, equal, sweep, rows, captions, keys, num_captions, told, fingerprints, snapshot
    )


def _row(entry: Entry, dag: Dag, artifacts: Mapping[str, Artifact]) -> Row:
    facts = artifacts[EVALUATE].facts
    kept = facts["kept"]
    return Row(
        name=entry.name,
        title=entry.title,
        system=entry.config.system,
        value=entry.value,
        metrics=facts["metrics"],
        trainings=trainings(entry.config),
        training_seconds=sum(artifacts[name].seconds for name, node in dag.items() if node.stage.part is not None),
        seconds_per_image=facts["seconds_per_image"]["heldout"],
        images=np.load(io.BytesIO(files.read(kept["uri"])), allow_pickle=False),
        correct=kept["correct"],
        intervals=facts["intervals"],
        bits_per_dim=next(iter(facts.get("bits_per_dim", {}).values()), None),
    )


def error_of(failures: Mapping[str, UnclipError]) -> StageError:
    """One error that tells what failed, with the exit code of the failures if they agree."""
    error = StageError("\n".join(f"{label}: {each}" for label, each in failures.items()))
    codes = {each.exit_code for each in failures.values()}
    error.exit_code = codes.pop() if len(codes) == 1 else StageError.exit_code
    return error


def settings_of(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Settings of all entries, for the records."""
    return [{"name": entry.name, "value": entry.value, "config": to_dict(entry.config)} for entry in entries]
