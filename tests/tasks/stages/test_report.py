import io
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from tasks import rows, tables
from tasks.lineage.traces import redact
from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Call, Run, execute
from tasks.stages.curate import CurateConfig, curate
from tasks.stages.download import IMAGES
from tasks.stages.embed import SCHEMA
from tasks.stages.report import Limit, ReportConfig, render
from tasks.tracking import Tracker

MALICIOUS = "<script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" & 'single'"
NUM_PAIRS = 30
LIMITS = (Limit("shorter_side", 32, None), Limit("caption_words", 2, 60), Limit("clip_score", 0.1, None))


def key_of(index: int) -> str:
    return f"{index:032x}"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """30 pairs on 3 hosts: 8 duplicates 5, 0 to 4 have low scores, 6 is small, 7 failed; one caption is malicious."""
    folder = tmp_path_factory.mktemp("report")
    embeddings = torch.nn.functional.normalize(torch.randn(NUM_PAIRS, 8), dim=1).numpy()
    images, pairs, selection = [], [], []
    for index in range(NUM_PAIRS):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (index * 8, 0, 0)).save(buffer, "JPEG")
        url = f"https://host{index % 3}.example/{index}.jpg"
        caption = MALICIOUS if index == 10 else f"image number {index}"
        outcomes = {6: ("dropped", "too_small"), 7: ("failed", "http_410"), 8: ("dropped", "duplicate_image")}
        status, reason = outcomes.get(index, ("kept", None))
        side = 20 if index == 6 else 64
        image = {"width": side, "height": side, "original_width": side, "original_height": side}
        image |= {"sha256": f"{5 if index == 8 else index:064x}", "phash": f"{index:016x}", "jpg": buffer.getvalue()}
        row = {"key": key_of(index), "url": url, "caption": caption}
        images.append(
            {**row, "status": "ok", **image} if index != 7 else {**row, "status": "failed", "reason": "http_410"}
        )
        pairs.append({**row, "position": index, "status": "kept", "reason": None})
        split = "train" if status == "kept" else None
        selection.append({"key": row["key"], "position": index, "status": status, "reason": reason, "split": split})
    uri = f"{folder}/images"
    tables.append_files(uri, [tables.write_part(uri, "a", pa.Table.from_pylist(images, schema=IMAGES))], IMAGES)
    tables.write_file(f"{folder}/pairs.parquet", pa.Table.from_pylist(pairs))
    tables.write_file(f"{folder}/selection.parquet", pa.Table.from_pylist(selection))
    kept = [index for index, row in enumerate(selection) if row["status"] == "kept"]
    embedded = {
        "key": [key_of(index) for index in kept],
        "caption": [""] * len(kept),
        "image_embedding": list(embeddings[kept]),
        "text_embedding": list(embeddings[kept]),
        "clip_score": np.array([0.05 if index < 5 else 0.3 for index in kept]),
        "tokens": [[1]] * len(kept),
    }
    store = f"{folder}/embeddings"
    tables.append_files(store, [tables.write_part(store, "a", pa.table(embedded, schema=SCHEMA))], SCHEMA)
    facts = {"pairs": f"{folder}/pairs.parquet", "selection": f"{folder}/selection.parquet", "images": uri}
    facts |= {"images_version": 0, "embeddings": store, "embeddings_version": 0}
    run = Run("r", "mine", str(folder), Tracker("", ""), "")
    curated = execute(
        Call(curate, CurateConfig(min_clip_score=0.1)), run, [Artifact("embed", "f", store, "d", facts, 0)]
    )
    assert isinstance(curated, Artifact), curated
    return curated


@pytest.fixture(scope="module")
def page(dataset: Artifact) -> str:
    return render("mine", Snapshot.of(dataset.facts), dataset.facts, ReportConfig(limits=LIMITS))


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_t8_captions_are_text_and_the_page_loads_nothing(page: str) -> None:
    parsed = Tags(page)
    names = {name for name, _ in parsed.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not [attrs for _, attrs in parsed.tags if any(name.startswith("on") for name in attrs)]
    sources = [value for _, attrs in parsed.tags for name, value in attrs.items() if name in ("src", "href")]
    assert sources and all(str(source).startswith("data:image/jpeg;base64,") for source in sources)
    assert MALICIOUS in " ".join(parsed.texts) and "http://" not in page and "url(" not in page


def test_the_page_shows_the_counts_and_explains_the_reasons(page: str, dataset: Artifact) -> None:
    text = " ".join(" ".join(Tags(page).texts).split())
    assert "30 in = 22 kept + 7 dropped + 1 failed" in text and "(1 of the dropped rows are duplicates)" in text
    for reason, count in dataset.facts["reasons"].items():
        assert re.search(rf"{reason} {count} .*{re.escape(rows.meaning(reason))}", text), reason
    assert "host0.example 10" in text and "3 in all" in text


def test_every_threshold_shows_its_line_and_the_nearest_rows(page: str) -> None:
    assert page.count('class="limit"') == 4  # 32 pixels, 2 and 60 words, a score of 0.1
    score = page.split("CLIP score: at least 0.1 cosine")[1]
    inside, outside = score.split("just dropped")[0], score.split("just dropped")[1].split("<h2>")[0]
    assert set(re.findall(r'data-key="(\w+)"', outside)) == {key_of(index) for index in range(5)}
    assert len(re.findall("data-key", inside)) == 8 and not set(re.findall(r'data-key="(\w+)"', inside)) & set(
        re.findall(r'data-key="(\w+)"', outside)
    )
    small = page.split("Shorter side of the original: at least 32")[1].split("<h2>")[0]
    assert key_of(6) in small.split("just dropped")[1]


def test_a_duplicate_is_shown_beside_the_kept_row(page: str) -> None:
    cluster = page.split("Duplicates</h2>")[1]
    assert re.findall(r'data-key="(\w+)"', cluster) == [key_of(5), key_of(8)] and "same bytes" in cluster


def test_the_same_dataset_gives_the_same_page(page: str, dataset: Artifact) -> None:
    assert render("mine", Snapshot.of(dataset.facts), dataset.facts, ReportConfig(limits=LIMITS)) == page


def test_a_row_can_be_redacted_from_a_page(page: str) -> None:
    clean = redact(page, frozenset({key_of(10)}))
    assert key_of(10) in page and key_of(10) not in clean and "alert(2)" not in clean and "taken down" in clean
    assert clean.count("<figure") == page.count("<figure") and key_of(11) in clean
