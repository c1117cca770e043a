"""A list of one row, a finished demo run shared by slow tests, and an object store."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of a finished demo run; UNCLIP_DEMO_STORAGE names an existing one to reuse."""
    storage = Path(os.environ.get("UNCLIP_DEMO_STORAGE") or tmp_path_factory.mktemp("demo"))
    subprocess.run([sys.executable, "-m", "pipelines", "run", "demo", "--storage", storage], cwd=ROOT, check=True)
    return storage


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """List of one row, at an address where no server is."""
    path = tmp_path_factory.mktemp("list") / "pairs.parquet"
    pq.write_table(pa.table({"url": ["http://127.0.0.1:1/a.jpg"], "caption": ["a red circle"]}), path)
    return path


@pytest.fixture
def s3() -> Iterator[dict[str, str]]:
    """Start an S3 server that fails intermittently, with an empty bucket `bucket`; yield the environment for clients."""
    port = 8771
    command = [sys.executable, str(ROOT / "tests" / "tasks" / "s3_server.py"), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    environment = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    environment |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "MLFLOW_S3_ENDPOINT_URL": endpoint}
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError

        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=endpoint, **keys)
        deadline = time.monotonic() + 60
        while True:
            try:
                client.create_bucket(Bucket="bucket")
                break
            except (BotoCoreError, ClientError):  # not up yet, or failing on purpose
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        yield environment
    finally:
        process.kill()
        process.wait()
