"""Model card of a published stack, in Markdown: the description of its registered version, and `README.md` beside the stack.

Texts that others wrote, such as names in settings, are escaped, and nothing in a card has credentials.

Source: Mitchell et al. 2019, "Model Cards for Model Reporting".
"""

import dataclasses
import datetime
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tasks import rows
from tasks.origin import Code
from tasks.tracking import IMAGES, MAX_DESCRIPTION, Listing, flatten
from unclip import files, imaging
from unclip.errors import InputError, StorageError
from unclip.messages import redacted, without_credentials
from unclip.systems.system import StackFiles

CARD = "README.md"
MAX_CARD = 60_000
"""Characters of the card in the artifacts."""
MAX_IMAGE_BYTES = 4 << 20
"""Images beyond this size stay with the evaluation."""
PREVIEW = "preview.png"
PREVIEW_ROWS = 2
PREVIEW_WIDTH = 760
"""Pixels; MLflow's page shows an image at its size."""
MAX_REASONS = 30
MAX_METRICS = 60
SHORT_GROUPS, SHORT_METRICS = 3, 1_900
"""Groups, and characters of the table, in a description."""
_MAX_HEADER_BYTES = 64 << 20
_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\`*_{}[]()#+!|~<>&"})
_GAP = "\N{NO-BREAK SPACE}" * 3
EXPORTABLE = ("unclip", "latent_diffusion", "stable_unclip")
"""Systems that `unclip export` takes."""


@dataclasses.dataclass(frozen=True)
class PartFacts:
    """A part of the system."""

    name: str
    kind: str
    num_parameters: int | None
    samples_seen: int | None
    image_size: int | None


@dataclasses.dataclass(frozen=True)
class Facts:
    """Everything that a card tells."""

    name: str
    """Registered model."""
    system: str
    digest: str
    """Digest of the stack."""
    at: float
    """Time of publication, seconds since 1970."""
    parts: Sequence[PartFacts]
    clip: str | None
    """CLIP of the stack, in words."""
    snapshot: str
    """Digest of the dataset version."""
    rows: Mapping[str, int]
    """in, kept, dropped and failed."""
    reasons: Mapping[str, int]
    metrics: Mapping[str, Mapping[str, float]]
    """Group of captions -> name -> value."""
    intervals: Mapping[str, Mapping[str, Sequence[float]]]
    """95 % intervals, as `metrics`; may lack any."""
    captions: Mapping[str, int]
    """Captions of each group."""
    counts: Mapping[str, Mapping[str, int]]
    """Images that a metric is about, as `metrics`; may lack any. Shown where it is not the number of captions."""
    images: Sequence[str]
    """Names of images in the folder `images/` beside the card."""
    has_preview: bool
    """There is `images/preview.png`."""
    image_size: int
    """Resolution of the images, pixels."""
    sampling: Mapping[str, Any]
    """Default sampling settings."""
    settings: Mapping[str, Any]
    """Settings of the run that published it; empty if they are not known."""
    code: Code
    pipeline: str = ""
    """Name of the pipeline, and of the dataset in MLflow."""

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters or 0 for part in self.parts)


def parts_of(folder: str, stack: StackFiles) -> list[PartFacts]:
    """Facts of the parts in the folder of a stack, from their `facts.json` and the headers of their weights.

    Args:
        folder: path or URI.
    """
    found = []
    for name in stack.models:
        facts = files.read_json(f"{folder}/{name}/facts.json")
        numbers = {
            key.rpartition(".")[2]: value for key, value in flatten(facts).items() if isinstance(value, int) and value
        }
        size = numbers.get("image_size")
        if {"low_res_size", "scale"} <= numbers.keys():  # a network that enlarges may be trained on crops
            size = numbers["low_res_size"] * numbers["scale"]
        num_parameters = count_parameters(f"{folder}/{name}/model.safetensors")
        found.append(PartFacts(name, str(facts.get("kind", "")), num_parameters, numbers.get("samples_seen"), size))
    return found


def count_parameters(uri: str) -> int | None:
    """Number of values in a safetensors file, from its header; None if it has none that can be read.

    Source: the format of safetensors, 8 bytes with the length of a JSON header.
    """
    try:
        filesystem, path = files.locate(uri)
        with filesystem.open_input_file(path) as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER_BYTES:
                return None
            header = json.loads(file.read(length))
        total = 0
        for name, entry in header.items():
            count = 1
            for size in entry["shape"] if name != "__metadata__" else (0,):
                count *= size
            total += count
        return total
    except (OSError, StorageError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None


def copy_images(images: Mapping[str, str], folder: str) -> list[str]:
    """Copy images into `images/` of a model's folder; returns their names, sample grids first.

    Args:
        images: name -> URI of a PNG.
        folder: path or URI.
    """
    names = sorted(images, key=lambda name: ("confusion" in name, name != "heldout", name))
    small = [name for name in names if files.size_of(images[name]) <= MAX_IMAGE_BYTES]
    for name in small:
        files.copy(images[name], f"{folder}/{IMAGES}/{name}.png")
    return [f"{name}.png" for name in small]


def write_preview(grid: str, folder: str, num_rows: int) -> bool:
    """Write the first rows of a grid of samples as `images/preview.png`, which is small enough for a description.

    Args:
        grid: URI of a PNG that `imaging.grid` made.
        num_rows: rows of the grid; if they do not divide it, all of it is shown.

    Returns:
        True if there is a preview.
    """
    from PIL import Image

    try:
        pixels = imaging.from_png(files.read(grid))
    except (OSError, StorageError, InputError):
        return False
    height = pixels.shape[0]
    if num_rows > PREVIEW_ROWS and (height - imaging.GAP) % num_rows == 0:
        pixels = pixels[: (height - imaging.GAP) // num_rows * PREVIEW_ROWS + imaging.GAP]
    image = Image.fromarray(pixels)
    image.thumbnail((PREVIEW_WIDTH, PREVIEW_WIDTH), Image.Resampling.LANCZOS)
    files.write(f"{folder}/{IMAGES}/{PREVIEW}", imaging.png(np.asarray(image)))
    return True


def listing_of(facts: Facts) -> Listing:
    """Text and numbers that MLflow shows with the version."""
    values = {
        f"{group}.{name.removeprefix('accuracy.')}": value
        for group, of_group in facts.metrics.items()
        for name, value in of_group.items()
    }
    params: dict[str, Any] = {"system": facts.system, "parts": ", ".join(part.name for part in facts.parts)}
    params |= {"image_size": facts.image_size, "parameters": facts.num_parameters or None}
    params |= {f"sampling.{name}": value for name, value in flatten(facts.sampling).items()}
    tags = {"unclip.image_size": str(facts.image_size), "unclip.version": facts.code.version or ""}
    tags |= {"unclip.git_commit": facts.code.commit or ""}
    return Listing(
        description=description(facts),
        model_description=(
            f"Text-to-image models of the system {in_code(facts.system)}, trained by unclip. Each version holds a stack with all "
            f"that sampling needs, and a card of its own. `unclip sample CAPTION --model {facts.name}` samples with the version "
            "in use."
        ),
        tags={name: value for name, value in tags.items() if value},
        params={name: value for name, value in params.items() if value is not None},
        metrics=values,
        dataset=(facts.pipeline, facts.snapshot) if facts.pipeline else None,
    )


def card(facts: Facts) -> str:
    """The whole card, at most MAX_CARD characters."""
    return _within([*_sections(facts), _settings(facts)], MAX_CARD, "The rest is left out: too long.")


def description(facts: Facts) -> str:
    """The card without what does not fit into a description of MLflow, at most MAX_DESCRIPTION characters."""
    return _within(_sections(facts, is_short=True), MAX_DESCRIPTION, f"The whole card is `{CARD}` in the artifacts.")


def _within(sections: Sequence[str], limit: int, note: str) -> str:
    """Join whole sections, in order, as far as they fit; a note says if some do not."""
    kept: list[str] = []
    size, is_whole = 0, True
    for section in filter(None, sections):
        if size + len(section) + 2 > limit - len(note) - 2:
            is_whole = False
            continue
        kept.append(section)
        size += len(section) + 2
    return "\n\n".join(kept if is_whole else [*kept, note]) + "\n"


def escaped(value: Any, limit: int = 200) -> str:
    """Text for Markdown in which nothing is markup: no link, image, HTML or cell of a table; one line, of bounded length."""
    return _one_line(value, limit).translate(_SPECIAL)


def in_code(value: Any) -> str:
    """Text as a span of code, which it cannot end; one line of bounded length."""
    text = _one_line(value).replace("`", "'").replace("|", "/")
    return f"`{text}`"


def _one_line(value: Any, limit: int = 200) -> str:
    text = " ".join(without_credentials(str(value)).split())
    text = "".join(character for character in text if character.isprintable())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _sections(facts: Facts, is_short: bool = False) -> list[str]:
    """Sections in the order of their weight: one that does not fit is left out."""
    shown = ([PREVIEW] if facts.has_preview else []) if is_short else facts.images
    return [
        _introduction(facts) if is_short else f"# {escaped(facts.name)}\n\n{_introduction(facts)}",
        *(f"![{escaped(name.removesuffix('.png'))} samples]({IMAGES}/{name})" for name in shown),
        _metrics(facts, is_short),
        _data(facts, 8 if is_short else MAX_REASONS),
        _use(facts),
        _code(facts),
        _licence(facts),
        _parts(facts),
        _sampling(facts, 12 if is_short else 200),
    ]


def _introduction(facts: Facts) -> str:
    size = f"Images of {facts.image_size} × {facts.image_size} pixels. "
    parts = " → ".join(escaped(part.name) for part in facts.parts)
    day = datetime.datetime.fromtimestamp(facts.at, datetime.UTC).date()
    weights = f", {facts.num_parameters / 1e6:.1f} million parameters" if facts.num_parameters else ""
    clip = f" CLIP: {escaped(facts.clip)}." if facts.clip else ""
    return (
        f"Text-to-image model of the system **{escaped(facts.system)}**: {parts}{weights}.{clip} "
        f"{size}Published {day.isoformat()}; digest {in_code(facts.digest[:16])}."
    )


def _parts(facts: Facts) -> str:
    cells = [
        (
            escaped(part.name),
            escaped(part.kind),
            f"{part.num_parameters:,}" if part.num_parameters else "",
            str(part.image_size or ""),
            f"{part.samples_seen:,}" if part.samples_seen else "",
        )
        for part in facts.parts
    ]
    return "## Parts\n\n" + _table(("part", "network", "parameters", "resolution", "samples trained on"), cells)


def _metrics(facts: Facts, is_short: bool) -> str:
    """Metrics with a column for each group of captions."""
    found = (group for group in facts.metrics if facts.metrics[group])
    groups = sorted(found, key=lambda group: (group != "heldout", group != "unseen", group))
    groups = groups[: SHORT_GROUPS if is_short else None]
    if not groups:
        return ""
    names = list(dict.fromkeys(name for group in groups for name in facts.metrics[group]))[:MAX_METRICS]
    header = ["metric", *(f"{escaped(group)}, {facts.captions.get(group, 0):,} captions" for group in groups)]
    cells = [(escaped(name), *(_value(facts, group, name) for group in groups)) for name in names]
    has_intervals = any(facts.intervals.get(group) for group in groups)
    note = "In brackets: 95 % intervals.\n\n" if has_intervals else ""
    shown = cells
    while is_short and len(shown) > 1 and len(_table(header, shown)) > SHORT_METRICS:
        shown = shown[:-1]
    more = f"\n\n{len(cells) - len(shown)} more metrics are in `{CARD}`." if len(shown) < len(cells) else ""
    return f"## Metrics\n\n{note}" + _table(header, shown) + more


def _value(facts: Facts, group: str, name: str) -> str:
    value = facts.metrics[group].get(name)
    if value is None:
        return ""
    interval = facts.intervals.get(group, {}).get(name)
    count = facts.counts.get(group, {}).get(name)
    notes = [f"{interval[0]:.3g} to {interval[1]:.3g}"] if interval else []
    notes += [f"{count:,} images"] if count not in (None, facts.captions.get(group)) else []
    return f"{value:.4g} ({'; '.join(notes)})" if notes else f"{value:.4g}"


def _data(facts: Facts, num_reasons: int) -> str:
    counts = facts.rows
    lines = [
        f"## Data\n\nDataset version {in_code(facts.snapshot[:16])}: {counts.get('in', 0):,} rows = "
        f"{counts.get('kept', 0):,} kept + {counts.get('dropped', 0):,} dropped + {counts.get('failed', 0):,} failed."
    ]
    reasons = rows.by_frequency(facts.reasons)
    if reasons:
        shown = [(f"{count:,}", in_code(reason), escaped(rows.meaning(reason))) for reason, count in reasons]
        lines.append(_table(("rows", "reason", "meaning"), shown[:num_reasons]))
        rest = sum(count for _, count in reasons[num_reasons:])
        if rest:
            lines.append(f"{rest:,} more rows for {len(reasons) - num_reasons} other reasons.")
    return "\n\n".join(lines)


def _use(facts: Facts) -> str:
    name = facts.name
    lines = [
        "## Use",
        "In an environment with unclip; nothing in the files of this version is executed.",
        f'```bash\nunclip sample "a caption" --model {name}\n'
        f"mlflow models serve -m models:/{name}@champion --env-manager local\n```",
        f'```python\nmodel = mlflow.pyfunc.load_model("models:/{name}@champion")\n'
        'images = model.predict(pandas.DataFrame({"caption": ["a caption"], "seed": [0]}))["png"]  # bytes of PNG files\n```',
    ]
    if facts.system in EXPORTABLE:
        lines.append(f"For diffusers: `unclip export FOLDER --model {name}`.")
    return "\n\n".join(lines)


def _code(facts: Facts) -> str:
    code = facts.code
    if not (code.version or code.commit):
        return ""
    version = f"unclip {escaped(code.version)}" if code.version else "unclip"
    if code.commit:
        version += f", commit {in_code(code.commit)}"
        version += " with changes that are in no commit" if code.is_changed else ""
        version += f", from {escaped(code.repository)}" if code.repository else ""
    return f"## Code\n\nPublished by {version}."


def _licence(facts: Facts) -> str:
    lines = ["## Licences\n\nThe code that trained it is under the Apache License 2.0."]
    if facts.settings.get("scenes"):
        lines.append("The images are procedural and the captions generated; both come with the code.")
    else:
        lines.append(
            "The images and captions that it was trained on keep the licences and rights of their owners; this card grants "
            "none in them, and no lawyer has read it."
        )
        lines += _opt_outs(facts.settings.get("download"))
    return " ".join(lines)


def _opt_outs(download: Any) -> Iterable[str]:
    """Sentences about robots.txt and opt-outs, as the settings of the download had them."""
    if not isinstance(download, Mapping) or "respect_robots" not in download:
        return
    yield (
        "robots.txt was obeyed." if download["respect_robots"] else "robots.txt was not read (respect_robots = false)."
    )
    directives = download.get("opt_out_directives") or []
    shown = ", ".join(escaped(directive) for directive in directives)
    yield "Images whose servers opt them out of AI use were left out (TDMRep, Content-Usage, Content-Signal" + (
        f"; X-Robots-Tag: {shown})." if shown else ")."
    )


def _sampling(facts: Facts, limit: int) -> str:
    values = flatten(facts.sampling)
    cells = [(in_code(name), in_code(json.dumps(value))) for name, value in list(values.items())[:limit]]
    more = f"\n\n{len(values) - limit} more are in `stack/stack.json`." if len(values) > limit else ""
    return "## Sampling\n\nDefaults:\n\n" + _table(("setting", "value"), cells) + more if cells else ""


def _settings(facts: Facts) -> str:
    """All settings of the run, in a block of code that no text in them can end."""
    if not facts.settings:
        return ""
    text = json.dumps(redacted(dict(facts.settings)), indent=1, sort_keys=True).replace("```", "'''")
    return f"## Settings\n\n```json\n{text}\n```"


def _table(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """Table whose cells end with a gap, since MLflow's pages put none between columns."""
    lines = [f"| {(_GAP + ' | ').join(line)}{_GAP} |" for line in (header, *cells)]
    return "\n".join([lines[0], f"|{' :--- |' * len(header)}", *lines[1:]])
