from pathlib import Path

import pytest
import yaml

from pipelines import config, dag
from pipelines.run import compose
from unclip.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", config.pipeline_names())
def test_every_preset_makes_a_pipeline(name: str) -> None:
    composed = compose(config.load(name, None, ["ingest.urls=pairs.parquet"]))
    assert next(iter(composed)) == "ingest" and list(composed)[-1] == "publish"
    assert set(dag.up_to(composed, "report")) == {
        "ingest",
        "download",
        "filter",
        "dedup",
        "clip",
        "embed",
        "curate",
        "report",
    }
    trainings = [composed[name] for name in ("prior", "decoder", "upsampler")]
    assert all("curate" in training.parents for training in trainings)
    assert not any({"prior", "decoder", "upsampler"} & set(training.parents) for training in trainings)


def test_the_clusters_run_file_is_a_run_file(tmp_path: Path) -> None:
    [run_file] = [
        document["data"]["run.toml"]
        for document in yaml.safe_load_all((ROOT / "infra" / "kubernetes" / "config.yaml").read_text())
        if "run.toml" in document["data"]
    ]
    (tmp_path / "run.toml").write_text(run_file)
    with pytest.raises(ConfigError, match=r"/models/.* does not exist"):  # it does on the cluster
        config.load("text_to_image", str(tmp_path / "run.toml"))
    loaded = config.load("text_to_image", str(tmp_path / "run.toml"), ["clip.pretrained=openai"])
    assert loaded.storage == "/data/unclip" and loaded.ingest.urls == "/data/pairs.parquet"


def test_later_sources_of_settings_win(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('storage = "from-file"\n[prior.trainer]\nseed = 5\nbatch_size = 7\n')
    loaded = config.load("tiny", str(tmp_path / "run.toml"), ["prior.trainer.seed=6"])
    assert (loaded.storage, loaded.prior.trainer.seed, loaded.prior.trainer.batch_size) == ("from-file", 6, 7)
    assert loaded.prior.model.num_heads == 4  # from demo, which tiny extends
    assert config.load("tiny", None, [], "elsewhere").storage == "elsewhere"


def test_the_picture_and_the_text_of_the_dag_show_every_stage() -> None:
    composed = compose(config.load("demo"))
    labels = {name: "cached" if name == "ingest" else "to run" for name in composed}
    text = dag.mermaid(composed, labels)
    assert all(name in text for name in composed) and "dedup --> embed" in text
    assert dag.picture(composed, labels).startswith(b"\x89PNG")
