"""Prompt suites: formats, categories, and files that are refused by name."""

from pathlib import Path

import pytest

from tasks import prompts
from tasks.prompts import read_suite
from tasks.stages.evaluate import EvaluateConfig, prompt_groups
from unclip import files
from unclip.errors import InputError


def suite(path: Path, name: str, text: str | bytes) -> str:
    file = path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("drawbench.csv", 'Prompts,Category\n"A red, wet car.",Colors\nTwo cats,Counting\n\nA sign,Colors\n'),
        ("parti.tsv", 'Category\tPrompt\tNote\nColors\t"A red, wet car."\tx\nCounting\tTwo cats\t\nColors\tA sign\t\n'),
        (
            "own.jsonl",
            '{"caption": "A red, wet car.", "category": "Colors"}\n{"text": "Two  cats", "category": "Counting"}\n\n'
            '{"prompt": "A sign", "category": "Colors", "seed": 3}\n',
        ),
    ],
)
def test_captions_by_category(tmp_path: Path, name: str, text: str) -> None:
    uri = suite(tmp_path, name, text)
    found = read_suite(uri)
    assert list(found.categories.items()) == [("colors", ["A red, wet car.", "A sign"]), ("counting", ["Two cats"])]
    assert found.digest == files.digest(uri)
    groups = prompt_groups(EvaluateConfig(prompts=uri, prompts_sha256=found.digest))
    assert list(groups) == ["prompts.colors", "prompts.counting"] and groups["prompts.counting"] == ["Two cats"]
    Path(uri).write_bytes(Path(uri).read_bytes() + b"\n")
    with pytest.raises(InputError, match="has changed since the run started"):
        prompt_groups(EvaluateConfig(prompts=uri, prompts_sha256=found.digest))


def test_plain_text_has_one_caption_on_each_line(tmp_path: Path) -> None:
    uri = suite(tmp_path, "prompts.txt", 'a red circle\r\n\n  a sign, "hello"\n'.encode("utf-16"))
    assert read_suite(uri).categories == {"": ["a red circle", 'a sign, "hello"']}
    assert prompt_groups(EvaluateConfig(prompts=uri)) == {"prompts": ["a red circle", 'a sign, "hello"']}
    assert prompt_groups(EvaluateConfig()) == {}


def test_categories_become_names_of_files(tmp_path: Path) -> None:
    text = 'prompt,category\na,../../etc/passwd\nb,"Rare Words (2)"\nc,\nd,Ünïcode\ne,"a\nb"\nf,颜色\ng,计数\n'
    names = list(read_suite(suite(tmp_path, "names.csv", text)).categories)
    assert names == ["etc-passwd", "rare-words-2", "", "ünïcode", "a-b", "颜色", "计数"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "got no captions"),
        ("a.txt", "\n \n", "got no captions"),
        ("a.csv", "title,category\nx,y\n", r"line 2: got the names category, title, expected one of prompt"),
        ("a.csv", "prompt\n\x1b\n", r"line 2: got no caption"),
        ("a.csv", 'prompt\n"open\n', "got a line that cannot be read"),
        ("a.jsonl", '{"prompt": "a"}\n[1]\n', "line 2: got the names none"),
        ("a.jsonl", '{"prompt": 7}\n', "line 1: got the names prompt"),
        ("a.jsonl", "{" + '"a":[' * 50_000, "line 1: got no JSON object"),
        ("a.txt", b"\xff\xfa\x00", "cannot be read"),
        ("a.txt", "a\n" * 301, r"line 301: got more than 300 captions"),
        ("a.csv", "prompt,category\n" + "".join(f"a,{n}\n" for n in range(65)), "or 64 categories"),
        ("a.txt", "a" * 5_000, r"got 5,000 bytes, expected at most 4,096"),
    ],
)
def test_what_is_no_suite_is_refused_by_line(
    tmp_path: Path, name: str, text: str | bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "bytes" in message:
        monkeypatch.setattr(prompts, "MAX_BYTES", 4096)
    monkeypatch.setattr(prompts, "MAX_PROMPTS", 300)
    with pytest.raises(InputError, match=message):
        read_suite(suite(tmp_path, name, text))
    with pytest.raises(InputError, match="cannot be read"):
        read_suite(str(tmp_path / "missing.txt"))


def test_a_long_caption_is_cut(tmp_path: Path) -> None:
    [caption] = read_suite(suite(tmp_path, "a.txt", "word " * 10_000)).categories[""]
    assert len(caption) <= 1_000
