import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import scene_server
from pipelines.scene_server import FAULTS, ScenesConfig
from tasks import tables
from unclip.errors import ConfigError, InputError

PORT = 18765


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as response:
        return bytes(response.read())


def test_list_is_deterministic_and_a_longer_list_extends_it(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.parquet", "b.parquet", "c.parquet")]
    small, large = ScenesConfig(num_images=100), ScenesConfig(num_images=400)
    for config, path in zip((small, small, large), paths, strict=True):
        scene_server.write_url_list(config, path)
    lists = [tables.read_file(path) for path in paths]
    assert lists[0].equals(lists[1])
    assert set(lists[0]["url"].to_pylist()) <= set(lists[2]["url"].to_pylist())
    assert (lists[0].num_rows, lists[2].num_rows) == (103, 412)
    kinds = {url.split("/")[-2] for url in lists[2]["url"].to_pylist()} - {"picture"}
    assert kinds == set(FAULTS) - {"file"} | {"etc"}


def test_another_configuration_has_other_urls() -> None:
    configs = (ScenesConfig(), ScenesConfig(seed=1), ScenesConfig(side=32), ScenesConfig(variant="relations"))
    assert len({config.prefix for config in configs}) == 4


def test_images_are_a_pure_function_of_their_url(tmp_path: Path) -> None:
    import io

    config = ScenesConfig(num_images=3, port=PORT)
    base = f"http://{config.address}{config.prefix}"
    with scene_server.serve(config) as server:
        first, again, copy = (get(f"{base}/{kind}/0.jpg") for kind in ("picture", "picture", "duplicate"))
        assert first == again == copy != get(f"{base}/picture/1.jpg")
        pixels, caption = scene_server.render(config, 0)
        assert np.abs(np.asarray(Image.open(io.BytesIO(first))).astype(int) - pixels).mean() < 6
        assert Image.open(io.BytesIO(get(f"{base}/small/0.jpg"))).size == (8, 8)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{base}/missing/0.jpg")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"http://{config.address}/single-64-99/picture/0.jpg")
        assert server.count("picture") == 4 and server.count("duplicate") == 1
    assert caption


def test_a_port_in_use_is_refused_with_a_remedy() -> None:
    config = ScenesConfig(port=PORT)
    with scene_server.serve(config), pytest.raises(InputError, match=f"{PORT} is in use.*--set scenes.port="):
        scene_server.serve(config).__enter__()


def test_invalid_settings_are_refused() -> None:
    for settings in ({"num_images": 0}, {"port": 0}, {"broken": 1.5}, {"side": 4}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            ScenesConfig(**settings)  # type: ignore[arg-type]
