"""`unclip models`, and every form of `--model`."""

import json
import shutil
from pathlib import Path

import pytest

from pipelines.published import find_model, find_stack
from tasks import published, registry
from tasks.database import artifacts_uri, database_uri
from tasks.store import Store
from tasks.tracking import Tracker, client
from tests.pipelines.command_line import STORAGE_NAME, call, call_json
from tests.tasks.publications import A, B, C, Storage, scores
from unclip.errors import DamagedError, InputError


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with MLflow's database and three versions: a champion, a worse one, and a better one."""
    store = Store(str(tmp_path_factory.mktemp("models") / STORAGE_NAME))
    storage = Storage(store, tracker=track(store))
    for digest, table in zip((A, B, C), scores(7, 0.7, 0.3, 0.95), strict=True):
        storage.publish(digest, table)
    return Path(store.root)


def track(store: Store) -> Tracker:
    uri = database_uri(str(store.database))
    Path(store.root).mkdir(parents=True)
    mlflow = client(uri)
    experiment = mlflow.create_experiment("tiny", artifact_location=artifacts_uri(uri))
    return Tracker(uri, mlflow.create_run(experiment).info.run_id)


@pytest.fixture
def storage(template: Path, tmp_path: Path) -> Path:
    """A copy at another place."""
    shutil.copytree(template, tmp_path / template.name)
    return tmp_path / template.name


def aliases(storage: Path) -> dict[str, str]:
    found = client(database_uri(f"{storage}/mlflow.db")).get_registered_model("model").aliases
    return {alias: str(version) for alias, version in found.items()}


def test_f150_the_registry_has_the_champion_and_why_the_others_are_not(template: Path) -> None:
    assert aliases(template) == {"champion": "3", "challenger": "2"}
    versions = registry.versions(client(database_uri(f"{template}/mlflow.db")), "model")
    assert [(each.version, each.digest, each.aliases) for each in versions] == [
        ("1", A, ()),
        ("2", B, ("challenger",)),
        ("3", C, ("champion",)),
    ]
    reasons = [each.tags["unclip.promotion"] for each in versions]
    assert reasons[0] == "the first champion" and reasons[1].startswith("worse than version 1: accuracy.all 0.3")
    assert reasons[2].startswith("better than version 1: accuracy.all 0.9")


def test_models_are_listed_and_shown(storage: Path) -> None:
    document = call_json("models", "list", "--storage", storage)
    assert [(each["name"], each["version"], each["aliases"]) for each in document["models"]] == [
        ("model", "1", []),
        ("model", "2", ["challenger"]),
        ("model", "3", ["champion"]),
    ]
    assert document["unanswered"] is None
    printed = call("models", "list", "--storage", storage).stdout.splitlines()
    assert printed[0].split()[:2] == ["model", "system"] and len(printed) == 4
    assert printed[3].startswith("model/3  champion") and "better than version 1" in printed[3]
    for model, version in (("model", "3"), ("model@challenger", "2"), ("model/1", "1"), (f"model/{A[:8]}", "1")):
        shown = call_json("models", "show", model, "--storage", storage)
        assert (shown["name"], shown["version"]) == ("model", version)
        assert f"model        model/{version}\n" in call("models", "show", model, "--storage", storage).stdout
    client(database_uri(f"{storage}/mlflow.db")).create_registered_model("Bob's model")
    assert call_json("models", "list", "--storage", storage) == document, "a model of another program"
    missing = call("models", "show", "model/9", "--storage", storage)
    assert missing.returncode == 2 and "model/9: not found" in missing.stderr and "model/1, model/2" in missing.stderr


def test_f151_promotion_by_hand_and_rollback_move_the_alias_and_what_is_sampled(storage: Path) -> None:
    folders = {digest: str(storage / "artifacts" / "publish" / (digest * 4) / "stack") for digest in (A, B, C)}
    assert find_stack(str(storage), None) == folders[C] == find_stack(str(storage), "model")
    result = call("models", "promote", "model@challenger", "--reason", "it looks better", "--storage", storage)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("model/2 is the champion: it looks better\n")
    assert "returns to model/3" in result.stdout
    assert aliases(storage) == {"champion": "2"} and find_stack(str(storage), None) == folders[B]
    for digest, version in ((C, "3"), (A, "1")):
        result = call("models", "rollback", "model", "--storage", storage)
        assert result.returncode == 0 and result.stdout.startswith(f"model/{version} is the champion: rolled back from")
        assert aliases(storage)["champion"] == version and find_stack(str(storage), None) == folders[digest]
    result = call("models", "rollback", "model", "--storage", storage)
    assert result.returncode == 2 and "has had no champion before" in result.stderr
    result = call("models", "rollback", "model@challenger", "--storage", storage)
    assert result.returncode == 2 and "NAME: got 'model@challenger', expected letters" in result.stderr
    found = registry.find(client(database_uri(f"{storage}/mlflow.db")), "model", version="2")
    assert found is not None and found.tags["unclip.promotion"].startswith(
        "was the champion until it was rolled back to"
    )


def test_every_form_of_model_finds_its_stack(storage: Path) -> None:
    """In a copy of a storage, with the database at the new place."""
    root = str(storage)
    for model, version in (("model", "3"), ("model@champion", "3"), ("model@challenger", "2"), ("model/1", "1")):
        found = find_model(root, model)
        assert (found.version, found.name) == (version, "model") and Path(found.folder, "stack.json").is_file()
        assert found.folder.startswith(root)
    assert find_model(root, "model").aliases == ("champion",)
    folder = str(storage / "artifacts" / "publish" / (A * 4) / "stack")
    assert find_stack("nowhere", folder) == folder, "a folder needs no storage"
    for wrong, words in (
        ("model@none", "neither MLflow at"),
        ("other", "neither MLflow at"),
        ("model/9", "neither MLflow at"),
        ("model/../x", "expected NAME, NAME@ALIAS, NAME/VERSION or the folder of a stack"),
        ("model@champion' OR 1=1", "expected NAME"),
    ):
        with pytest.raises(InputError, match=words):
            find_model(root, wrong)


def test_f153_without_mlflow_the_records_of_the_storage_tell(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert find_model(str(storage), "model").version == "3" and find_model(str(storage), "model/1").digest == A
    result = call("models", "rollback", "model", "--storage", storage)
    assert result.returncode == 0 and "MLflow's aliases stay as they are until it answers" in result.stderr
    assert find_model(str(storage), None).digest == A and published.read(Store(str(storage)), "model").is_ahead
    listed = call("models", "list", "--storage", storage)
    assert listed.returncode == 0 and "MLflow does not answer" in listed.stderr and "model/1  champion" in listed.stdout
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert find_model(str(storage), "model").digest == A, "MLflow is behind"
    assert call("models", "promote", "model/2", "--storage", storage).returncode == 0
    assert aliases(storage) == {"champion": "2"} and not published.read(Store(str(storage)), "model").is_ahead


def test_an_alias_that_was_moved_in_mlflow_counts(storage: Path) -> None:
    client(database_uri(f"{storage}/mlflow.db")).set_registered_model_alias("model", "champion", "1")
    assert find_model(str(storage), "model").version == "1"
    listed = call_json("models", "list", "--storage", storage)["models"]
    assert [each["version"] for each in listed if "champion" in each["aliases"]] == ["1"]
    assert call("models", "rollback", "model", "--storage", storage).stdout.startswith("model/3 is the champion")


def test_f153_numbers_of_another_mlflow_are_not_those_of_the_record(storage: Path, tmp_path: Path) -> None:
    """The server that is used from now on has other stacks under the same name and numbers."""
    store = Store(str(storage))
    other = track(Store(str(tmp_path / "other")))
    mlflow = client(other.tracking_uri)
    mlflow.create_registered_model("model")
    for number in range(3):
        mlflow.create_model_version("model", "x", other.run_id, tags={"unclip.digest": str(number)})
    worse, better = scores(7, 0.3, 1.0)
    assert Storage(store, tracker=other).publish(B, worse).entry.version == "4"
    found = registry.versions(mlflow, "model")
    assert [(each.aliases, each.tags.get("unclip.promotion")) for each in found[:3]] == [((), None)] * 3
    assert found[3].aliases == ("challenger",) and published.read(store, "model").is_ahead
    outcome = Storage(store, tracker=other).publish("d" * 16, better)
    assert outcome.alias == "champion" and "better than version 3" in str(outcome.entry.reason)
    assert not published.read(store, "model").is_ahead


@pytest.mark.parametrize("num_writes", [0, 1])
def test_f151_a_kill_while_mlflow_follows_changes_no_decision(
    storage: Path, num_writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run ends as the killed one would have."""
    tracker = Tracker(database_uri(f"{storage}/mlflow.db"), registry_run(storage))
    publishing, better = Storage(Store(str(storage)), tracker=tracker), scores(7, 1.0)[0]
    left, write = [None] * num_writes, published.write

    def killed(store: Store, record: published.Record) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        write(store, record)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(published, "write", killed)
        publishing.publish("d" * 16, better)
    outcome = publishing.publish("d" * 16, better)
    assert (outcome.alias, outcome.entry.version) == ("champion", "4") and aliases(storage)["champion"] == "4"
    assert str(outcome.entry.reason).startswith("better than version 3") and publishing.record().former == (A, C)
    assert not publishing.record().is_ahead


def registry_run(storage: Path) -> str:
    """Run that registered the versions."""
    return str(client(database_uri(f"{storage}/mlflow.db")).get_model_version("model", "1").run_id)


def test_a_stack_that_the_storage_has_lost_comes_from_the_registry(storage: Path) -> None:
    shutil.rmtree(storage / "artifacts" / "publish")
    for model in (None, "model", "model/1"):
        folder = find_stack(str(storage), model)
        assert "mlflow-artifacts" in folder and Path(folder, "stack.json").is_file()
    shutil.rmtree(storage / "mlflow-artifacts")
    with pytest.raises(InputError, match=r"model/3: .* does not have its stack any more, nor has MLflow"):
        find_stack(str(storage), None)


def test_f154_versions_of_an_earlier_release_are_found(storage: Path) -> None:
    """It had the alias `latest-published`, no tags, and a record of the last stack only."""
    mlflow = client(database_uri(f"{storage}/mlflow.db"))
    for alias in ("champion", "challenger"):
        mlflow.delete_registered_model_alias("model", alias)
    mlflow.set_registered_model_alias("model", "latest-published", "1")
    for version in "123":
        for tag in ("unclip.digest", "unclip.promotion"):
            mlflow.delete_model_version_tag("model", version, tag)
    run_id = mlflow.get_model_version("model", "1").run_id
    mlflow.set_tag(run_id, "unclip.digest", A)
    record = storage / "published" / "model.json"
    stack = json.loads(record.read_text())["versions"][0]["stack"]
    Store(str(storage)).write_json({"stack": stack, "digest": A, "at": 5.0}, "published", "model.json")
    for model in (None, "model", "model/1", "model@latest-published"):
        assert find_model(str(storage), model).folder == str(storage / "artifacts" / "publish" / (A * 4) / "stack")
    [champion] = [
        each for each in call_json("models", "list", "--storage", storage)["models"] if "champion" in each["aliases"]
    ]
    assert champion["version"] == "1" and champion["digest"] == A
    again = Storage(Store(str(storage)), tracker=Tracker(database_uri(f"{storage}/mlflow.db"), run_id))
    outcome = again.publish(A, scores(7, 0.7)[0], lambda _: "3")
    assert outcome.alias == "champion" and aliases(storage) == {"champion": "3"}


def test_a_storage_without_a_champion_says_so(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    record = published.Record("model").challenge(published.Entry("", A, 1.0), "accuracy.all is 0, below the minimum 1")
    published.write(store, record)
    with pytest.raises(InputError, match=r"has no champion: accuracy.all is 0, .* Sample from model@chall"):
        find_stack(str(tmp_path), None)


@pytest.mark.parametrize("part", ["champion", "challenger", "versions"])
@pytest.mark.parametrize(
    "stack", ["s3://bucket/x?scheme=http&endpoint_override=127.0.0.1:9", "/elsewhere/stack", "storage://../stack", 3]
)
def test_a_record_with_a_stack_outside_of_the_storage_is_refused(tmp_path: Path, part: str, stack: object) -> None:
    """A copied storage would choose the server that gets a request signed by the operator."""
    store = Store(str(tmp_path))
    entry = {"stack": stack, "digest": A, "at": 1.0}
    record = {"champion": entry, "challenger": {"challenger": entry}, "versions": {"versions": [entry]}}[part]
    store.write_json(record, "published", "model.json")
    for model in (None, "model"):
        with pytest.raises(DamagedError, match=r"published/model\.json: got the stack .*, expected a folder in "):
            find_model(str(tmp_path), model)
    result = call("models", "list", "--storage", tmp_path)
    assert result.returncode == 2 and "model.json" in result.stderr and not result.stdout


def test_a_stack_of_an_object_store_has_no_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("gs://bucket/prefix")
    entry = {"stack": "storage://artifacts/publish/f/stack", "at": 1.0}
    documents = [entry, {**entry, "stack": "storage://stack?endpoint_override=127.0.0.1:9"}]
    monkeypatch.setattr(Store, "exists", lambda *_: True)
    monkeypatch.setattr(Store, "read_json", lambda self, *_: self.resolve(documents.pop(0)))
    champion = published.read(store, "model").champion
    assert champion is not None and champion.stack == "gs://bucket/prefix/artifacts/publish/f/stack"
    with pytest.raises(DamagedError, match="endpoint_override"):
        published.read(store, "model")
