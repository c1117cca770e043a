"""Hours, bytes and cost of a pipeline's stages for a number of pairs: arithmetic alone, from rates, shares and sizes.

Each stage's rate is the one that the storage measured (`pipelines.measured`), otherwise the one in `pipelines.shipped_rates`.
Data stages run one after another on all CPUs; embedding and training use the GPUs, or the CPUs if there are none. Trainings
that do not need each other divide the GPUs so that they end together, and run one after another if there are fewer GPUs than
trainings. Stages that encode every kept row for a training, such as images to latents, have all GPUs to themselves, after the
training that they need. The report is made beside the trainings.

Bytes are those that stay in the storage, and those that are fetched: from the web by the download, from the storage by others.
A stage pays for the GPUs or the CPUs that compute it while it runs, and for its bytes during one month.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from pipelines.quantities import hours, number, size
from pipelines.shipped_rates import (
    CHROMA,
    COLUMN_BYTES,
    CPU_FLOPS,
    CPUS_PER_GPU,
    DECODE_SECONDS,
    GPU_FLOPS,
    JPEG_BYTES,
    ORIGINAL_BYTES,
    PAIR_BYTES,
    PARAMETER_BYTES,
    PREPROCESS_SECONDS,
    RATES,
    SELECTION_BYTES,
    SHARES,
)

DATA_STAGES = ("ingest", "download", "filter", "dedup", "embed", "curate")
"""Stages that pass rows on, in order."""
ENCODINGS = ("latents", "text_states")
"""Stages that encode kept rows for trainings."""
HOUR = 3600.0


@dataclasses.dataclass(frozen=True)
class Machine:
    """Cluster that a pipeline runs on."""

    gpus: int = 1
    """0 embeds and trains on CPUs."""
    cpus: int = CPUS_PER_GPU
    gpu_flops: float = GPU_FLOPS
    """FLOPs per second that a GPU achieves, not its peak."""

    @property
    def devices(self) -> int:
        """Number of GPUs, or of CPUs without any."""
        return self.gpus or self.cpus

    @property
    def device(self) -> str:
        return "GPU" if self.gpus else "CPU"

    @property
    def flops(self) -> float:
        """FLOPs per second of a device."""
        return self.gpu_flops if self.gpus else CPU_FLOPS


@dataclasses.dataclass(frozen=True)
class Prices:
    """Prices in any currency; 0 for what is free."""

    gpu_hour: float = 0
    """GPU, its host included, for one hour."""
    cpu_hour: float = 0
    terabyte_month: float = 0


@dataclasses.dataclass(frozen=True)
class TrainingWork:
    """Training of one model."""

    name: str
    num_samples: int
    batch_size: int
    flops_per_sample: float
    """Forward and backward pass, as `unclip plan train` counts them."""
    parameters: int
    num_checkpoints: int
    """Checkpoints that are kept."""
    columns: tuple[str, ...]
    """Columns of the tables that it reads."""
    after: tuple[str, ...] = ()
    """Other trainings, and encodings, that it needs."""
    num_models: int = 1
    """Copies of the final weights that are stored."""


@dataclasses.dataclass(frozen=True)
class EncodingWork:
    """Encoding of one column of all kept rows, held-out ones too, by a frozen model."""

    name: str
    unit: str
    """Name of the rows in the formula: images, or captions."""
    flops: float
    """FLOPs to encode one of them."""
    reads: str
    """Column of the dataset."""
    stores: str
    """Column of the encodings."""
    value_bytes: float
    """Bytes of one encoding."""
    formula: str
    """Numbers that `value_bytes` follow from."""
    speed: float = 1
    """Speed of the arithmetic on a GPU relative to bf16."""
    after: tuple[str, ...] = ()
    """Trainings that it needs."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """Facts of a pipeline's configuration that its hours and bytes follow from."""

    image_size: int
    chroma_subsampling: str
    embedding_dim: int
    clip_flops: float
    """FLOPs to embed one pair, with a caption of full length."""
    clip_parameters: int
    holdout: float
    trainings: tuple[TrainingWork, ...]
    """Trainings of the system's parts."""
    num_captions: int
    """Captions that evaluation samples."""
    caption_flops: float
    """FLOPs to sample one of them."""
    sampling_batch: int
    clip_training: TrainingWork | None = None
    """None for a pretrained CLIP."""
    clip_speed: float = 1
    """Speed of embedding on a GPU relative to bf16."""
    compared: int = 0
    """Embeddings that semantic deduplication compares each one with; 0 without it."""
    num_probes: int = 0
    encodings: tuple[EncodingWork, ...] = ()
    """Encodings that trainings need."""

    @property
    def works(self) -> tuple[TrainingWork | EncodingWork, ...]:
        """Trainings, each after the encodings that it needs."""
        found: dict[str, TrainingWork | EncodingWork] = {}
        for training in self.trainings:
            found |= {work.name: work for work in self.encodings if work.name in training.after}
            found[training.name] = training
        return tuple(found.values())


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Finished work of one stage in a storage."""

    rows: int
    """Rows in; samples of a training, captions of an evaluation."""
    seconds: float
    workers: float
    """CPUs that did the work, or GPUs."""
    row_bytes: float | None = None
    """Bytes stored for each row in; None if unknown."""

    @property
    def rate(self) -> float:
        """Rows per second of one worker."""
        return self.rows / self.seconds / self.workers


@dataclasses.dataclass(frozen=True)
class Measured:
    """Rates, shares and sizes that a storage measured, as far as it did."""

    stages: Mapping[str, Measurement] = dataclasses.field(default_factory=dict)
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Stage -> share of its rows that it kept."""
    image_size: int | None = None
    """Resolution of the images that the download's `row_bytes` belong to; None if these are unknown."""
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Finished stage -> reason why its rate says nothing about this estimate."""


@dataclasses.dataclass(frozen=True)
class StageEstimate:
    """Estimate of one stage."""

    stage: str
    rows_in: int
    """Rows; captions of an evaluation."""
    rows_out: int | None
    """Rows that are kept; None for stages that select none."""
    hours: float
    stored_bytes: int
    """Bytes that stay in the storage."""
    network_bytes: int
    """Bytes that are fetched, from the web or from the storage."""
    cost: float | None
    """None without prices."""
    gpus: int
    """GPUs that compute it."""
    cpus: int
    """CPUs that compute it; 0 if GPUs do."""
    is_measured: bool
    """True if the rate is the storage's, False if it is shipped."""
    how: str
    """Formula with its numbers, and their sources."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimate of a whole run."""

    pairs: int
    hours: float
    """Hours from start to end; stages that run at the same time count once."""
    stored_bytes: int
    network_bytes: int
    cost: float | None
    how: str
    """Composition of the hours."""
    stages: tuple[StageEstimate, ...]


def estimate(
    workload: Workload, pairs: int, machine: Machine, measured: Measured | None = None, prices: Prices | None = None
) -> Estimate:
    """Estimate every stage for a list of `pairs` rows."""
    each = _Estimator(workload, pairs, machine, measured or Measured(), prices)
    before = [each.ingest(), each.download(), each.filter(), each.dedup()]
    if workload.clip_training is not None:
        before.append(each.training(workload.clip_training, machine.devices))
    before += [each.embed(), each.curate()]
    report = each.report()
    encoded = [each.encoding(work) for work in workload.encodings]
    trained, training_hours, in_turn = each.trainings()
    last = [each.evaluate(), each.publish()]
    by_name = {stage.stage: stage for stage in (*encoded, *trained)}
    stages = (*before, report, *(by_name[work.name] for work in workload.works), *last)
    data_hours = sum(stage.hours for stage in before)
    encoding_hours = sum(stage.hours for stage in encoded)
    model_hours = encoding_hours + training_hours + sum(stage.hours for stage in last)
    encoding = f"{hours(encoding_hours)} h of encoding + " if encoded else ""
    together = "one after another" if in_turn else "side by side"
    costs = [stage.cost for stage in stages if stage.cost is not None]
    return Estimate(
        pairs=pairs,
        hours=data_hours + max(report.hours, model_hours),
        stored_bytes=sum(stage.stored_bytes for stage in stages),
        network_bytes=sum(stage.network_bytes for stage in stages),
        cost=sum(costs) if prices else None,
        how=f"{hours(data_hours)} h of data stages, one after another + {encoding}{hours(training_hours)} h of trainings, "
        f"{together} on {_workers(machine.devices, machine.device)} + {hours(sum(stage.hours for stage in last))} h of "
        "evaluation; the report is made beside the trainings.",
        stages=stages,
    )


class _Estimator:
    """Estimates of the stages of one run; each needs the rows that the stages before it keep."""

    def __init__(
        self, workload: Workload, pairs: int, machine: Machine, measured: Measured, prices: Prices | None
    ) -> None:
        self.workload, self.machine, self.measured, self.prices = workload, machine, measured, prices
        self.rows = {"": pairs}
        """Stage -> rows that it keeps; "" for the list."""
        for before, name in itertools.pairwise(("", *DATA_STAGES)):
            self.rows[name] = round(self.rows[before] * measured.shares.get(name, SHARES[name]))
        self.image_bytes = self._image_bytes()

    def ingest(self) -> StageEstimate:
        return self._data_stage("ingest", "", PAIR_BYTES, PAIR_BYTES)

    def download(self) -> StageEstimate:
        rows, kept = self.rows["ingest"], self.rows["download"]
        rate, source = self._rate("download")
        stored, scaled = self._download_row_bytes()
        gigabits = 8 * ORIGINAL_BYTES * rate * self.machine.cpus * kept / max(rows, 1) / 1e9
        note = f"fetches {size(ORIGINAL_BYTES)} an image, {number(gigabits)} Gbit/s; {scaled}"
        fetched = kept * ORIGINAL_BYTES + rows * PAIR_BYTES
        return self._on_cpus("download", rows, kept, rate, source, rows * stored, fetched, note)

    def filter(self) -> StageEstimate:
        return self._data_stage("filter", "download", SELECTION_BYTES, PAIR_BYTES)

    def dedup(self) -> StageEstimate:
        return self._data_stage("dedup", "filter", SELECTION_BYTES, 2 * SELECTION_BYTES)

    def embed(self) -> StageEstimate:
        rows, work = self.rows["dedup"], self.workload
        row_bytes = 2 * 4 * work.embedding_dim + SELECTION_BYTES + COLUMN_BYTES["caption"] + COLUMN_BYTES["tokens"]
        cpu_seconds = DECODE_SECONDS * self._area() + PREPROCESS_SECONDS
        devices, speed = self.machine.devices, work.clip_speed
        seconds, how = self._compute("embed", rows, work.clip_flops, cpu_seconds, devices, "pairs", speed=speed)
        stored, note = self._stored("embed", row_bytes)
        how += f"; {note}"
        return self._on_devices(
            "embed",
            rows,
            self.rows["embed"],
            seconds,
            self.machine.devices,
            rows * stored,
            rows * self.image_bytes,
            how,
        )

    def curate(self) -> StageEstimate:
        work, extra, note = self.workload, 0.0, ""
        if work.compared and "curate" not in self.measured.stages:
            extra = work.compared * 2 * work.embedding_dim / CPU_FLOPS
            note = f"of which {1e6 * extra:.0f} us a row compare it with {number(work.compared)} others"
        stored = 2 * SELECTION_BYTES + 4 * work.num_probes
        return self._data_stage("curate", "embed", stored, 4 * work.embedding_dim, extra, note)

    def report(self) -> StageEstimate:
        return self._data_stage("report", "curate", 0, SELECTION_BYTES)

    def trainings(self) -> tuple[list[StageEstimate], float, bool]:
        """Estimates of the parts' trainings, their hours together, and True if any ran one after another."""
        found: dict[str, StageEstimate] = {}
        total, in_turn = 0.0, False
        for works in waves(self.workload.works):
            wave = [work for work in works if isinstance(work, TrainingWork)]
            if not wave:
                continue
            devices = self.machine.devices
            alone = [self.training(work, 1).hours for work in wave]
            if devices >= len(wave):
                shares = divide(devices, alone, [work.batch_size for work in wave])
                stages = [self.training(work, share) for work, share in zip(wave, shares, strict=True)]
                total += max(stage.hours for stage in stages)
            else:
                stages = [self.training(work, devices) for work in wave]
                total += sum(stage.hours for stage in stages)
                in_turn = True
            found |= {stage.stage: stage for stage in stages}
        return [found[work.name] for work in self.workload.trainings], total, in_turn

    def encoding(self, work: EncodingWork) -> StageEstimate:
        """Estimate of one encoding, on all devices."""
        rows, devices = self.rows["curate"], self.machine.devices
        decode = DECODE_SECONDS * self._area() if work.reads == "jpg" else 0.0
        seconds, how = self._compute(work.name, rows, work.flops, decode, devices, work.unit, speed=work.speed)
        stored, note = self._stored(work.name, work.value_bytes + SELECTION_BYTES)
        how += f"; {note}" if work.name in self.measured.stages else f"; {note}: {work.formula}, and the key"
        read = rows * self._column_bytes(work.reads)
        return self._on_devices(work.name, rows, None, seconds, devices, rows * stored, read, how)

    def training(self, work: TrainingWork, devices: int) -> StageEstimate:
        """Estimate of one training on a number of devices."""
        is_clip = work is self.workload.clip_training
        rows = round(self.rows["dedup" if is_clip else "curate"] * (1 - self.workload.holdout))
        decode = DECODE_SECONDS * self._area() if "jpg" in work.columns else 0.0
        devices = min(devices, work.batch_size)
        seconds, how = self._compute(
            work.name, work.num_samples, work.flops_per_sample, decode, devices, "samples", share=True
        )
        values = 4 * work.num_checkpoints + work.num_models
        how += f"; {number(work.num_samples / max(rows, 1))} epochs of {number(rows)} rows"
        how += f"; stores {work.num_checkpoints} checkpoints and the weights, {number(work.parameters)} parameters"
        read = sum(map(self._column_bytes, work.columns)) * work.num_samples
        stored = values * PARAMETER_BYTES * work.parameters
        return self._on_devices(work.name, rows, None, seconds, devices, stored, read, how)

    def evaluate(self) -> StageEstimate:
        work = self.workload
        devices = min(self.machine.devices, math.ceil(work.num_captions / work.sampling_batch))
        seconds, how = self._compute("evaluate", work.num_captions, work.caption_flops, 0, devices, "captions")
        return self._on_devices("evaluate", work.num_captions, None, seconds, devices, 0, 0, how)

    def publish(self) -> StageEstimate:
        parameters = self.workload.clip_parameters + sum(work.parameters for work in self.workload.trainings)
        stored = PARAMETER_BYTES * parameters
        how = (
            f"copies the weights of all models and of CLIP, {number(parameters)} parameters of {PARAMETER_BYTES} bytes"
        )
        return self._on_devices("publish", 0, None, 0.0, 0, stored, stored, how)

    def _data_stage(
        self, name: str, before: str, stored: float, read: float, extra_seconds: float = 0, note: str = ""
    ) -> StageEstimate:
        """Estimate of a stage whose time and bytes are proportional to its rows.

        Args:
            before: stage that the rows come from.
            stored, read: shipped bytes a row.
            extra_seconds: CPU seconds a row besides the rate's.
        """
        rows = self.rows[before]
        rate, source = self._rate(name)
        rate = 1 / (1 / rate + extra_seconds)
        row_bytes, stored_note = self._stored(name, stored)
        notes = "; ".join(filter(None, (note, stored_note)))
        return self._on_cpus(name, rows, self.rows.get(name), rate, source, rows * row_bytes, rows * read, notes)

    def _on_cpus(
        self, name: str, rows: int, kept: int | None, rate: float, source: str, stored: float, read: float, note: str
    ) -> StageEstimate:
        cpus = self.machine.cpus
        how = f"{number(rows)} rows / ({_workers(cpus, 'CPU')} x {number(rate)} rows/s, {source})"
        if kept is not None:
            share = self.measured.shares.get(name, SHARES[name])
            how += f"; keeps {share:.1%}, {'measured' if name in self.measured.shares else 'shipped'}"
        how += f"; {note}." if note else "."
        seconds = rows / (cpus * rate)
        return self._stage(name, rows, kept, seconds, 0, cpus, stored, read, how)

    def _on_devices(
        self, name: str, rows: int, kept: int | None, seconds: float, devices: int, stored: float, read: float, how: str
    ) -> StageEstimate:
        gpus, cpus = (devices, 0) if self.machine.gpus else (0, devices)
        return self._stage(name, rows, kept, seconds, gpus, cpus, stored, read, f"{how}.")

    def _stage(
        self,
        name: str,
        rows: int,
        kept: int | None,
        seconds: float,
        gpus: int,
        cpus: int,
        stored: float,
        read: float,
        how: str,
    ) -> StageEstimate:
        cost, duration = None, seconds / HOUR
        if self.prices is not None:
            hourly = gpus * self.prices.gpu_hour + cpus * self.prices.cpu_hour
            cost = duration * hourly + stored / 1e12 * self.prices.terabyte_month
        is_measured = name in self.measured.stages
        return StageEstimate(name, rows, kept, duration, round(stored), round(read), cost, gpus, cpus, is_measured, how)

    def _rate(self, name: str) -> tuple[float, str]:
        """Rows per second of a CPU, and their source."""
        found = self.measured.stages.get(name)
        if found is None:
            return RATES[name], f"shipped{self._why_not(name)}"
        return found.rate, _source(found, "CPU", "rows")

    def _why_not(self, name: str) -> str:
        """Reason for a shipped rate, if the storage has finished the stage."""
        return f", as {self.measured.ignored[name]}" if name in self.measured.ignored else ""

    def _compute(
        self,
        name: str,
        rows: int,
        flops: float,
        cpu_seconds: float,
        devices: int,
        unit: str,
        share: bool = False,
        speed: float = 1,
    ) -> tuple[float, str]:
        """Seconds that devices need for rows of so many FLOPs, and the formula.

        Args:
            cpu_seconds: CPU seconds that each row needs before a GPU can use it.
            share: CPUs feed several stages at the same time, in proportion to the GPUs of each.
            speed: speed of the arithmetic on a GPU relative to bf16.
        """
        machine, found = self.machine, self.measured.stages.get(name)
        on = _workers(devices, machine.device)
        if found is not None:
            source = _source(found, machine.device, unit)
            return rows / (devices * found.rate), f"{number(rows)} {unit} / ({on} x {number(found.rate)}/s, {source})"
        source = "given" if machine.gpus and machine.gpu_flops != GPU_FLOPS else "shipped"
        source += self._why_not(name)
        each = machine.flops
        if machine.gpus and speed != 1:
            each *= speed
            source += f", {speed:.0%} of bf16's for float32"
        formula = f"{number(rows)} {unit} x {_flop(flops)} / ({on} x {_flop(each)}/s, {source})"
        seconds = rows * flops / (devices * each)
        if not cpu_seconds:
            return seconds, formula
        cpus = machine.cpus * devices / machine.gpus if share and machine.gpus else devices if share else machine.cpus
        decoding = rows * cpu_seconds / cpus
        decode = f"{number(rows)} {unit} x {1e3 * cpu_seconds:.2g} ms to decode / {_workers(cpus, 'CPU')}"
        if not machine.gpus:
            return seconds + decoding, f"{formula} + {decode}"
        if decoding > seconds:
            return decoding, f"{decode}, for which the GPUs wait: {formula}"
        return seconds, f"{formula}; the CPUs keep up: {decode}"

    def _stored(self, name: str, shipped: float) -> tuple[float, str]:
        """Bytes stored for each row, and a note."""
        found = self.measured.stages.get(name)
        if found is not None and found.row_bytes is not None:
            return found.row_bytes, f"stores {size(found.row_bytes)} a row, measured"
        return shipped, f"stores {size(shipped)} a row, shipped" if shipped else ""

    def _area(self) -> float:
        """Area of a stored image, relative to 256 pixels."""
        return (self.workload.image_size / 256) ** 2

    def _download_row_bytes(self) -> tuple[float, str]:
        """Bytes stored for each row that is tried, and a note."""
        found, then, now = self.measured.stages.get("download"), self.measured.image_size, self.workload.image_size
        if found is not None and found.row_bytes is not None and then is not None:
            scaled = "" if then == now else f" at {then} px x ({now}/{then})^2"
            return found.row_bytes * (now / then) ** 2, f"stores {size(found.row_bytes)} a row{scaled}, measured"
        chroma = self.workload.chroma_subsampling
        each = JPEG_BYTES * self._area() * CHROMA[chroma]
        share = self.measured.shares.get("download", SHARES["download"])
        smaller = "; smaller images are not enlarged and take less" if now > 256 else ""
        note = f"stores {size(each)} an image of {now} px, quality 95, {chroma}, and {PAIR_BYTES} B a row, shipped{smaller}"
        return each * share + PAIR_BYTES, note

    def _image_bytes(self) -> float:
        """Bytes to read one stored image."""
        return self._download_row_bytes()[0] * self.rows["ingest"] / max(self.rows["download"], 1)

    def _column_bytes(self, column: str) -> float:
        if column == "jpg":
            return self.image_bytes
        for work in self.workload.encodings:
            if column == work.stores:
                return self._stored(work.name, work.value_bytes)[0]
        return 4 * self.workload.embedding_dim if column.endswith("_embedding") else COLUMN_BYTES.get(column, 4)


def waves(works: Sequence[TrainingWork | EncodingWork]) -> list[list[TrainingWork | EncodingWork]]:
    """Groups of trainings and encodings that do not need each other, in the order in which they run."""
    depth: dict[str, int] = {}
    for work in works:  # parents are listed first
        depth[work.name] = 1 + max((depth[name] for name in work.after), default=-1)
    return [[work for work in works if depth[work.name] == wave] for wave in range(max(depth.values(), default=-1) + 1)]


def divide(devices: int, hours_alone: Sequence[float], limits: Sequence[int]) -> list[int]:
    """Divide devices among trainings, at least one each, so that the last one ends as early as possible.

    Args:
        hours_alone: hours of each training on one device.
        limits: largest useful number of devices of each training.
    """
    shares = [1] * len(hours_alone)
    for _ in range(devices - len(shares)):
        growing = [index for index, share in enumerate(shares) if share < limits[index]]
        if not growing:
            break
        shares[max(growing, key=lambda index: hours_alone[index] / shares[index])] += 1
    return shares


def _source(found: Measurement, device: str, unit: str) -> str:
    return f"measured: {found.rows:,} {unit} in {found.seconds:,.0f} s on {_workers(found.workers, device)}"


def _workers(count: float, device: str) -> str:
    return f"{number(count)} {device}{'s' * (count != 1)}"


def _flop(value: float) -> str:
    text = number(value)
    return f"{text[:-1]} {text[-1]}FLOP" if text[-1].isalpha() else f"{text} FLOP"
