"""Lookup of published stacks."""

from pathlib import Path

from pipelines.storage import open_storage, open_tracked
from unclip.errors import InputError
from unclip.messages import reason_of, without_credentials


def find_stack(storage: str, model: str | None) -> str:
    """Return the local folder of a published stack.

    Args:
        storage: storage that the pipeline published to.
        model: "name" or "name@alias" of a model in the MLflow registry; None takes the stack published last in the storage.

    Raises:
        InputError: nothing was published, or MLflow has no such model.
    """
    if model is None:
        store = open_storage(storage)
        names = store.list("published")
        if not names:
            raise InputError(
                f"{store.root}: nothing has been published here. Run a pipeline, or give its folder with --storage."
            )
        records = [store.read_json("published", name) for name in names]
        return str(max(records, key=lambda record: record["at"])["stack"])
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    from tasks.database import artifacts_here
    from tasks.tracking import client

    store, uri = open_tracked(storage)
    name, _, alias = model.partition("@")
    try:
        version = client(uri).get_model_version_by_alias(name, alias or "latest-published")
        source = artifacts_here(store, uri, version.run_id, version.source)
        return stack_in(str(download_artifacts(artifact_uri=source, tracking_uri=uri)))
    except MlflowException as error:
        raise InputError(
            f"--model {model}: MLflow at {without_credentials(uri)} does not have it: {reason_of(error)}"
        ) from None


def stack_in(folder: str) -> str:
    """Return the stack in the folder of a registered version: the folder `stack` in it, or, if an earlier release published it,
    the folder itself. Nothing else in the folder is read.

    Raises:
        InputError: `stack` is a link to another place.
    """
    stack = Path(folder, "stack")
    if Path(folder, "stack.json").is_file() or not stack.is_dir():
        return folder
    if not stack.resolve().is_relative_to(Path(folder).resolve()):
        raise InputError(f"{stack}: a link to {stack.resolve()}, outside of the model. Publish the stack again.")
    return str(stack)
