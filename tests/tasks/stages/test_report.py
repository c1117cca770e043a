import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from tasks import index, ranges, rows, tables
from tasks.lineage.traces import redact
from tasks.report_page import Limit, read_thumbnails, render
from tasks.report_summary import Tables
from tasks.snapshots import Snapshot
from tasks.stage import Artifact
from tasks.stages.download import IMAGES
from tasks.stages.embed import SCHEMA
from tasks.stages.report import ReportConfig, summarise
from tasks.summaries import CutCaptions
from tests.tasks.datasets import write_folder

MALICIOUS = "<script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" & 'single'"
NUM_PAIRS = 30
LIMITS = (Limit("shorter_side", 32, None), Limit("caption_words", 2, 60), Limit("clip_score", 0.1, None))


def key_of(index: int) -> str:
    return hashlib.sha256(str(index).encode()).hexdigest()[:32]


def make_dataset(folder: str, num_ranges: int) -> Artifact:
    """30 pairs on 3 hosts: 8 duplicates 5, 9 looks like 11, 12 means the same as 13, 0 to 4 have low scores, 6 is small, 7
    failed; one caption is malicious."""
    embeddings = torch.nn.functional.normalize(torch.randn(NUM_PAIRS, 8, generator=torch.manual_seed(0)), dim=1).numpy()
    embeddings[12] = embeddings[13]
    outcomes = dict.fromkeys(range(5), ("dropped", "clip_score_low"))
    outcomes |= {6: ("dropped", "too_small"), 7: ("failed", "http_410"), 8: ("dropped", "duplicate_image")}
    outcomes |= {9: ("dropped", "near_duplicate"), 12: ("dropped", "semantic_duplicate")}
    images, pairs, selection = [], [], []
    for number in range(NUM_PAIRS):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (number * 8, 0, 0)).save(buffer, "JPEG")
        url = f"https://host{number % 3}.example/{number}.jpg"
        caption = MALICIOUS if number == 10 else f"image number {number}"
        status, reason = outcomes.get(number, ("kept", None))
        side = 20 if number == 6 else 64
        phash = int(key_of(11 if number == 9 else number)[:16], 16) ^ (3 if number == 9 else 0)
        image = {"width": side, "height": side, "original_width": side, "original_height": side}
        image |= {"sha256": f"{5 if number == 8 else number:064x}", "phash": f"{phash:016x}", "jpg": buffer.getvalue()}
        row = {"key": key_of(number), "url": url, "caption": caption}
        images.append(
            {**row, "status": "ok", **image} if number != 7 else {**row, "status": "failed", "reason": "http_410"}
        )
        pairs.append({**row, "position": number, "status": "kept", "reason": None})
        split = "train" if status == "kept" else None
        selection.append({"key": row["key"], "position": number, "status": status, "reason": reason, "split": split})
    uri = f"{folder}/images/recipe"
    halves = [pa.Table.from_pylist(half, schema=IMAGES) for half in (images[:15], images[15:])]
    parts = [tables.write_part(uri, str(number), half) for number, half in enumerate(halves)]
    images_version = tables.append_files(uri, parts, IMAGES)
    index_version = index.update_index(uri, images_version)
    selected = pa.Table.from_pylist(selection)
    embedded = [number for number in range(NUM_PAIRS) if number not in outcomes or number < 5 or number == 12]
    scores = np.array([0.05 if number < 5 else 0.3 for number in embedded])
    columns = {
        "key": [key_of(number) for number in embedded],
        "caption": [""] * len(embedded),
        "image_embedding": list(embeddings[embedded]),
        "text_embedding": list(embeddings[embedded]),
        "clip_score": scores,
        "tokens": [[1]] * len(embedded),
        "tokens_lost": [0] * len(embedded),
    }
    store = f"{folder}/embeddings"
    part = tables.write_part(store, "a", pa.table(columns, schema=SCHEMA))
    embeddings_version = tables.append_files(store, [part], SCHEMA)
    scored = pa.table({"key": columns["key"], "clip_score": scores, "embeddings_row": range(len(embedded))})
    lost = pa.array([None, *range(len(embedded) - 1)], pa.int32())
    scored = scored.append_column("tokens_lost", lost)
    counts = rows.count(selected)
    snapshot = {
        "digest": "d1" * 32,
        "selection": write_folder(f"{folder}/selection", selected, num_ranges),
        "images": uri,
        "images_version": images_version,
        "index_version": index_version,
        "embeddings": store,
        "embeddings_version": embeddings_version,
        "scores": write_folder(f"{folder}/scores", scored, num_ranges),
        "places": "",
        "heldout": "",
        "statistics": "",
    }
    facts = {**counts, "pairs": write_folder(f"{folder}/pairs", pa.Table.from_pylist(pairs), num_ranges)}
    return Artifact("curate", "f", snapshot["selection"], "d1" * 32, {**facts, "snapshot": snapshot}, 0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dataset(str(tmp_path_factory.mktemp("report")), 1)


def page_of(dataset: Artifact, folder: Path) -> str:
    """Page that is made of all rows."""
    config = ReportConfig(limits=LIMITS)
    found = summarise(Tables.of(dataset.facts), config.lists(), f"{folder}/hosts", f"{folder}/scratch")
    return render("mine", dataset.facts, config.limits, config.lists(), found)


@pytest.fixture(scope="module")
def page(dataset: Artifact, tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(dataset, tmp_path_factory.mktemp("page"))


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
    assert "30 in = 20 kept + 9 dropped + 1 failed" in text and "(3 of the dropped rows are duplicates)" in text
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
    clusters = page.split("Duplicates</h2>")[1].split('class="cluster"')[1:]
    found = [(re.findall(r'data-key="(\w+)"', cluster), cluster) for cluster in clusters]
    assert [keys for keys, _ in found] == [[key_of(kept), key_of(other)] for kept, other in ((5, 8), (11, 9), (13, 12))]
    for (_, cluster), note in zip(found, ("same bytes", "2 of 64 bits differ", "cosine 1.000"), strict=True):
        assert note in cluster


@pytest.mark.usefixtures("cluster")
def test_ranges_of_keys_give_the_page_of_the_whole(page: str, tmp_path: Path) -> None:
    dataset = make_dataset(str(tmp_path), 8)
    assert page_of(dataset, tmp_path) == page


def test_charts_count_all_rows_that_have_a_value(page: str) -> None:
    counted = [int(count) for count in re.findall(r"<title>[-.\d]+ to [-.\d]+: (\d+)</title>", page)]
    sides, ratios, words, characters, scores = (sum(counted[start : start + 40]) for start in range(0, 200, 40))
    assert len(counted) == 200 and sides == ratios == NUM_PAIRS - 1 and words == characters == NUM_PAIRS
    assert scores == 26


def test_a_page_reads_only_the_row_groups_of_the_images_it_shows(dataset: Artifact) -> None:
    snapshot = Snapshot.of(dataset.facts)
    files = index.index_files(snapshot.images, snapshot.index_version)
    [place] = ranges.find_rows(files, [key_of(20)]).to_pylist()
    Path(snapshot.images, "0.parquet").rename(Path(snapshot.images, "away"))
    try:
        assert list(read_thumbnails(snapshot.images, files, [key_of(20)])) == [key_of(20)]
    finally:
        Path(snapshot.images, "away").rename(Path(snapshot.images, "0.parquet"))
    assert place["part"] == "1.parquet"


def test_the_same_dataset_gives_the_same_page(page: str, dataset: Artifact, tmp_path: Path) -> None:
    assert page_of(dataset, tmp_path) == page


def test_a_row_can_be_redacted_from_a_page(page: str) -> None:
    clean = redact(page, frozenset({key_of(10)}))
    assert key_of(10) in page and key_of(10) not in clean and "alert(2)" not in clean and "taken down" in clean
    assert clean.count("<figure") == page.count("<figure") and key_of(11) in clean


@pytest.mark.parametrize("num_ranges", [1, 4])
def test_f102_the_page_tells_how_many_captions_are_cut_and_tokens_lost(tmp_path: Path, num_ranges: int) -> None:
    """All rows with a score but the first have a number of lost tokens; rows below the least score are not counted."""
    dataset = make_dataset(str(tmp_path), num_ranges)
    kept = dataset.facts["rows"]["kept"]
    scores = ranges.read_all(dataset.facts["snapshot"]["scores"])
    status = {row["key"]: row["status"] for row in ranges.read_all(dataset.facts["snapshot"]["selection"]).to_pylist()}
    lost = [row["tokens_lost"] for row in scores.to_pylist() if status[row["key"]] == "kept"]
    counted = [number for number in lost if number is not None]
    cut = sum(number > 0 for number in counted)
    assert 0 < cut <= kept
    page = page_of(dataset, tmp_path)
    text = f"{cut} of {len(counted)} captions of kept rows ({100 * cut / len(counted):.3g} %) have more tokens than CLIP reads"
    assert text in page and f"; {sum(counted)} tokens are lost" in page


def test_f102_shares_are_written_without_exponents() -> None:
    counts = {(7, 7): "100 %", (995, 1000): "99.5 %", (3, 40): "7.5 %", (1, 10**7): "less than 0.01 %", (0, 0): "0 %"}
    assert {pair: CutCaptions(pair[1], pair[0], 0).share for pair in counts} == counts
