"""The page of `unclip serve`: its files, and the page itself in headless Chromium on a server with two small stacks."""

import asyncio
import contextlib
import fnmatch
import io
import itertools
import json
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
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from pipelines.serving.app import Api, create_app
from pipelines.serving.engine import Engine
from pipelines.serving.models import Models
from pipelines.serving.requests import Limits
from tests.pipelines.command_line import ROOT
from tests.pipelines.serving.browser import Watched, chromium, finished, open_page
from tests.unclip.systems import tiny_stacks

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


def test_the_page_is_served_with_a_policy_that_forbids_all_other_hosts_and_inline_code() -> None:
    engine = Engine(max_images=1, wait_seconds=0)
    app = create_app(Api(engine, Models(engine, "unused", ()), Limits(), token="0" * 16, hosts=None))

    async def get() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return [await client.get(name) for name in ("/", *(path.name for path in FILES))]

    answers = asyncio.run(get())
    assert answers[0].content == (PAGE / "index.html").read_bytes()
    types = {path.name: answer.headers["content-type"] for path, answer in zip(FILES, answers[1:], strict=True)}
    assert types["app.js"].startswith("text/javascript") and types["style.css"].startswith("text/css")
    for answer in answers:
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        directives = dict(part.split(maxsplit=1) for part in answer.headers["content-security-policy"].split("; "))
        assert directives["default-src"] == directives["frame-ancestors"] == directives["base-uri"] == "'none'"
        assert set(" ".join(directives.values()).split()) == {"'none'", "'self'", "blob:"}


def test_without_chromium_the_tests_say_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"), chromium():
        pass


@contextlib.contextmanager
def serving(storage: Path, *options: str, port: int = PORT) -> Iterator[str]:
    """Start `unclip serve` on what a storage has published, wait until it is ready, and yield its address."""
    address = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "pipelines", "serve", "--storage", storage, "--port", str(port), *options]
    log = storage / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=storage, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 180
        while not is_ready(address):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}healthz", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def sampled(address: str, **fields: Any) -> list[Any]:
    """Images that the server samples when it is asked without the page."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}v1/images/generations", json.dumps(fields).encode(), headers)
    with urllib.request.urlopen(request) as response:
        return [pixels(b64decode(item["b64_json"])) for item in json.load(response)["data"]]


def pixels(png: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).tolist()


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with two published models: `large`, whose images have 16 pixels, and `small`, whose images have 8."""
    folder = tmp_path_factory.mktemp("storage")
    stacks = {name: tiny_stacks.publish(folder / name, num) for num, name in enumerate(("small", "large"))}
    (folder / "published").mkdir()
    for at, (name, stack) in enumerate(stacks.items()):
        record = {"stack": str(stack), "digest": f"{at}" * 64, "at": at}
        (folder / "published" / f"{name}.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def address(storage: Path) -> Iterator[str]:
    with serving(storage) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def watched(browser: Browser, address: str) -> Iterator[Watched]:
    """The page on a desktop, on which nothing may go wrong in the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    found = open_page(context, address)
    yield found
    context.close()
    assert not found.complaints
    assert found.hosts <= {"127.0.0.1", None}


def generate(page: Page, caption: str = "a red circle", seed: int = 7, count: int = 2) -> None:
    page.uncheck("#random")
    for field, value in (("seed", seed), ("count", count), ("caption", caption)):
        page.fill(f"#{field}", str(value))
    with finished(page):
        page.click("#submit")


def images(page: Page) -> list[Any]:
    """Pixels of the images of the result, as the page downloads them."""
    found = []
    for link in page.locator("#result [data-action=download]").all():
        with page.expect_download() as download:
            link.click()
        found.append(pixels(download.value.path().read_bytes()))
    return found


@pytest.mark.slow
def test_generated_images_are_those_of_the_seed(watched: Watched, address: str) -> None:
    page = watched.page
    generate(page, seed=7)
    assert images(page) == sampled(address, prompt="a red circle", seed=7, n=2)
    assert page.locator(".label").all_inner_texts()[0].endswith("seed 7")
    expect(page.locator("#announcement")).to_contain_text("2 images")
    size = page.eval_on_selector(".tile img", "image => [image.naturalWidth, image.clientWidth, image.clientHeight]")
    assert size[0] == 16 and size[1] == size[2] >= 256 and size[1] % 16 == 0  # large, and no pixel wider than others
    assert page.eval_on_selector(".tile img", "image => getComputedStyle(image).imageRendering") == "pixelated"


@pytest.mark.slow
def test_a_random_seed_is_shown_and_can_be_used_again(watched: Watched) -> None:
    page = watched.page
    page.fill("#caption", "a blue star")
    with finished(page):
        page.click("#submit")
    first, seed = images(page), page.input_value("#seed")
    assert f"seed {seed}" in page.inner_text("#result .details")
    with finished(page):
        page.click("#submit")
    assert images(page) != first and page.input_value("#seed") != seed
    page.locator("#history [data-action=reuse]").nth(1).click()
    assert page.input_value("#seed") == seed and not page.is_checked("#random")
    with finished(page):
        page.click("#submit")
    assert images(page) == first


@pytest.mark.slow
def test_variations_and_an_interpolation_start_from_images_that_were_clicked(watched: Watched) -> None:
    page = watched.page
    generate(page)
    given = images(page)
    with finished(page):
        page.locator("[data-action=vary]").nth(1).click()
    expect(page.locator("#result h2")).to_have_text("Variations")
    varied = images(page)
    assert len(varied) == 2 and given[1] not in varied
    page.locator("[data-action=start]").nth(0).click()
    assert page.is_disabled("#interpolate")
    page.locator("[data-action=end]").nth(1).click()
    page.fill("#way", "4")
    with finished(page):
        page.click("#interpolate")
    shown = []
    for position in range(4):
        assert page.get_attribute("#position", "aria-valuetext") == f"image {position + 1} of 4"
        shown += images(page)
        page.press("#position", "ArrowRight")
    assert len(shown) == 4 and all(one != other for one, other in itertools.pairwise(shown))


@pytest.mark.slow
def test_only_what_was_painted_is_made_anew(watched: Watched) -> None:
    page = watched.page
    generate(page)
    given = np.array(images(page)[0])
    page.locator("[data-action=edit]").nth(0).click()
    page.click("#apply-edit")
    expect(page.locator("#editor-problem")).to_contain_text("Paint over a part")
    page.fill("#size", "40")
    box = page.locator("#board").bounding_box()
    assert box is not None
    x, y, side = box["x"], box["y"], box["width"]
    page.mouse.move(x + side / 4, y + side / 4)
    page.mouse.down()
    page.mouse.move(x + side * 3 / 4, y + side / 4, steps=4)
    page.mouse.up()
    expect(page.locator("#painted")).to_contain_text("% is painted")
    page.fill("#edit-caption", "a blue star")
    with finished(page):
        page.click("#apply-edit")
    edited = np.array(images(page)[0])
    assert (edited[9:] == given[9:]).all(), "the lower part was not painted"
    assert (edited[2:6, 3:13] != given[2:6, 3:13]).any(axis=2).mean() > 0.5


@pytest.mark.slow
def test_two_models_are_compared_on_the_same_seed(watched: Watched, address: str) -> None:
    page = watched.page
    names = page.locator("#model option").evaluate_all("options => options.map(option => option.value)")
    assert len(names) == 2
    page.check("[name=mode][value=compare]")
    generate(page, count=1)
    assert page.locator(".comparison h3").all_inner_texts() == names
    assert images(page) == [sampled(address, prompt="a red circle", seed=7, n=1, model=name)[0] for name in names]


@pytest.mark.slow
def test_the_history_outlives_the_page_and_can_be_deleted(watched: Watched) -> None:
    page = watched.page
    generate(page, "a red circle")
    generate(page, "a blue star")
    page.reload()
    expect(page.locator("#history .title")).to_have_text(["a blue star", "a red circle"])
    page.locator("#history [data-action=show]").nth(1).click()
    expect(page.locator("#result h2")).to_have_text("a red circle")
    page.locator("#history [data-action=forget]").nth(1).click()
    expect(page.locator("#result h2")).to_have_text("a blue star")
    page.click("#forget-all")
    expect(page.locator("#history-section")).to_be_hidden()
    expect(page.locator("#result .empty")).to_be_visible()
    page.reload()
    expect(page.locator("#result .empty")).to_be_visible()


@pytest.mark.slow
def test_an_image_file_can_be_varied(watched: Watched, tmp_path: Path) -> None:
    page = watched.page
    Image.fromarray(np.full((30, 50, 3), 90, np.uint8)).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("no image")
    page.set_input_files("#file", tmp_path / "text.png")
    page.wait_for_selector("text=the browser cannot read this image")
    page.set_input_files("#file", tmp_path / "photo.png")
    page.wait_for_selector("#result .tile")
    assert images(page) == [[[[90] * 3] * 30] * 30]
    with finished(page):
        page.locator("[data-action=vary]").click()
    assert len(images(page)) == 4


@pytest.mark.slow
def test_the_keyboard_alone_is_enough(watched: Watched) -> None:
    page = watched.page
    expect(page.locator("#caption")).to_be_focused()
    page.keyboard.type("a red circle")
    with finished(page):
        page.keyboard.press("Enter")
    given = np.array(images(page)[0])
    tab_to(page, "#count")
    page.keyboard.press("ArrowDown")
    tab_to(page, "#result [data-action=edit]")
    page.keyboard.press("Enter")
    expect(page.locator("#board")).to_be_focused()
    for key in ("Shift+ArrowUp", "Shift+ArrowUp", "Space", "Shift+ArrowLeft", "Space"):
        page.keyboard.press(key)
    expect(page.locator("#painted")).to_contain_text("% is painted")
    tab_to(page, "#apply-edit")
    with finished(page):
        page.keyboard.press("Enter")
    edited = np.array(images(page))
    assert len(edited) == 3 and (edited[0][10:] == given[10:]).all() and (edited[0] != given).any()
    for name in ("start", "end"):
        tab_to(page, f"#result [data-action={name}]")
        page.keyboard.press("Enter")
    tab_to(page, "#interpolate")
    with finished(page):
        page.keyboard.press("Enter")
    tab_to(page, "#position")
    page.keyboard.press("End")
    assert page.get_attribute("#position", "aria-valuetext") == "image 8 of 8"


def tab_to(page: Page, selector: str) -> None:
    """Press Tab until an element has the focus; it must be visible there, as at every stop before."""
    for _ in range(80):
        page.keyboard.press("Tab")
        reached, is_visible = page.evaluate(
            """selector => {
                const element = document.activeElement;
                const marked = [element, element.nextElementSibling, element.previousElementSibling?.querySelector("label")];
                const outlined = (each) => each && getComputedStyle(each).outlineStyle !== "none";
                return [element.matches(selector), element === document.body || marked.some(outlined)];
            }""",
            selector,
        )
        assert is_visible, page.evaluate("document.activeElement.outerHTML")
        if reached:
            return
    pytest.fail(f"Tab does not reach {selector}")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(browser: Browser, address: str, scheme: Any) -> None:
    size = {"width": 360, "height": 740}
    context = browser.new_context(
        viewport=size, is_mobile=True, has_touch=True, device_scale_factor=2, color_scheme=scheme
    )
    watched = open_page(context, address)
    page = watched.page

    def fits() -> bool:
        return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth && innerWidth <= 360"))

    assert fits()
    page.check("[name=mode][value=compare]")
    generate(page, "a caption with-one-word-that-is-much-longer-than-any-screen-of-a-phone-could-ever-be-wide", count=3)
    assert fits()
    page.check("[name=mode][value=generate]")
    generate(page, count=4)
    assert fits()
    page.locator("[data-action=edit]").nth(3).tap()
    assert fits()
    expect(page.locator("#painted")).to_have_text("Nothing is painted.")
    page.locator("#board").tap()
    expect(page.locator("#painted")).to_contain_text("% is painted")
    with finished(page):
        page.locator("#apply-edit").tap()
    page.locator("[data-action=start]").nth(0).tap()
    page.locator("[data-action=end]").nth(1).tap()
    assert fits()
    with finished(page):
        page.locator("#interpolate").tap()
    assert fits()
    context.close()
    assert not watched.complaints and watched.hosts <= {"127.0.0.1", None}


@pytest.mark.slow
def test_an_error_is_shown_at_its_field(browser: Browser, address: str) -> None:
    context = browser.new_context()
    watched = open_page(context, address)
    page = watched.page
    page.fill("#caption", "<img src=x onerror=alert(1)>")
    page.fill("#steps", "1000000")
    page.click("#submit")
    page.wait_for_selector("#steps-error")
    assert page.get_attribute("#steps", "aria-describedby") == "steps-error"
    expect(page.locator("#steps")).to_be_focused()
    page.fill("#steps", "")
    with finished(page):
        page.click("#submit")
    expect(page.locator("#result h2")).to_have_text("<img src=x onerror=alert(1)>")
    assert page.locator("#steps-error").count() == 0 and page.get_attribute("#steps", "aria-invalid") is None
    context.close()
    assert len(watched.complaints) == 1 and "Failed to load resource" in watched.complaints[0]  # Chromium logs each 4xx


@pytest.mark.slow
def test_a_request_can_be_stopped(watched: Watched) -> None:
    page = watched.page
    generate(page)
    page.fill("#steps", "100")
    page.fill("#count", "10")
    page.click("#submit")
    expect(page.locator("#submit")).to_have_text("Stop")
    page.click("#submit")
    page.wait_for_selector("#announcement:text-is('Stopped.')", state="attached")
    expect(page.locator("#submit")).to_have_text("Generate")
    assert page.locator("#result .tile").count() == 2, "the result before is shown again"


@pytest.mark.slow
def test_the_page_asks_for_the_token_and_says_when_the_server_has_gone(browser: Browser, storage: Path) -> None:
    token = "a-token-of-this-test"
    (storage / "token").write_text(token)
    context = browser.new_context()
    page = context.new_page()
    with serving(storage, "--token-file", str(storage / "token"), port=PORT + 1) as address:
        page.goto(address)
        for given, problem in (("wrong", ""), (token, "The server refused this token.")):
            expect(page.locator("#token")).to_be_focused()
            expect(page.locator("#lock-problem")).to_have_text(problem)
            page.fill("#token", given)
            page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("Ready · 2 models")
        generate(page, count=1)
        page.reload()
        expect(page.locator("#status")).to_have_text("Ready · 2 models")  # the tab keeps the token
        assert page.is_hidden("#lock")
    page.fill("#caption", "a blue star")
    page.click("#submit")
    expect(page.locator("#problem")).to_contain_text("The server cannot be reached.")
    expect(page.locator("#result .tile")).to_have_count(1)
    expect(page.locator("#status")).to_contain_text("cannot be reached", timeout=20_000)
    assert context.cookies() == [] and token not in page.evaluate("JSON.stringify(localStorage)")
    context.close()
