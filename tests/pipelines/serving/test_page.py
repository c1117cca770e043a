"""The page of `unclip serve`: its files, and the page itself in headless Chromium on a server with two small stacks."""

import contextlib
import fnmatch
import io
import json
import os
import re
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.pipelines.command_line import ROOT
from tests.unclip.systems import tiny_stacks

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from tests.pipelines.serving.browser import Watched

PAGE = ROOT / "pipelines" / "serving" / "page"
FILES = sorted(PAGE.iterdir())
SCRIPTS = [path.read_text() for path in FILES if path.suffix == ".js"]
PORT = 8796
ADDRESS = f"http://127.0.0.1:{PORT}/"


class Elements(HTMLParser):
    """Tags and attributes of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed((PAGE / "index.html").read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, name: str) -> list[str]:
        """Values of an attribute, in order."""
        return [attributes[name] or "" for _, attributes in self.found if name in attributes]


ELEMENTS = Elements()


def test_the_page_names_no_other_host() -> None:
    for path in FILES:
        text = path.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|[\"'(]//|@import|\burl\(", text), path.name
    for link in (*ELEMENTS.all("src"), *ELEMENTS.all("href")):
        assert link.startswith("#") or (PAGE / link).exists(), link


def test_the_page_has_no_inline_code_and_makes_no_markup_of_strings() -> None:
    """Text of the server stays text, and the page works under its Content-Security-Policy."""
    for tag, attributes in ELEMENTS.found:
        assert tag != "style" and not any(name == "style" or name.startswith("on") for name in attributes), tag
        assert tag != "script" or "src" in attributes
    markup = r"\.(inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|setHTML"
    assert not [re.findall(markup, script) for script in SCRIPTS if re.search(markup, script)]


def test_ids_and_actions_of_the_scripts_are_those_of_the_page() -> None:
    ids = ELEMENTS.all("id")
    assert len(ids) == len(set(ids))
    used = {name for script in SCRIPTS for name in re.findall(r'byId\("([\w-]+)"\)', script)}
    assert len(used) > 30 and used <= set(ids)
    named = [*ELEMENTS.all("for"), *ELEMENTS.all("aria-labelledby"), *ELEMENTS.all("aria-describedby")]
    assert {*named} <= set(ids)
    app = (PAGE / "app.js").read_text()
    tables = re.findall(r"const (?:IMAGE|ENTRY)_ACTIONS = \{(.*?)^\};", app, re.MULTILINE | re.DOTALL)
    handled = {name for table in tables for name in re.findall(r"^  (?:async )?(\w+)", table, re.MULTILINE)}
    assert set(ELEMENTS.all("data-action")) - {"download"} == handled


def test_every_field_has_a_label() -> None:
    labelled = {*ELEMENTS.all("for"), "random", "erase"}  # these two are inside their labels
    fields = [attributes for tag, attributes in ELEMENTS.found if tag in ("input", "select", "textarea")]
    assert {field["id"] for field in fields if field.get("type") != "radio"} <= labelled


def test_all_files_of_the_page_are_package_data() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = data["pipelines"]
    for path in FILES:
        name = str(path.relative_to(ROOT / "pipelines"))
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name
