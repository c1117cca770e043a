import dataclasses
import json

import pytest

from unclip import files
from unclip.config import to_dict
from unclip.errors import StorageError
from unclip.messages import reason_of, without_credentials

CANARY = "c4n+4ry/SECRET"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:{}@a.example:5000/x", "http://a.example:5000/x"),
        ("http://{}@a.example", "http://a.example"),  # a token
        ("HTTPS://:{}@a.example/", "HTTPS://a.example/"),
        ("s3://KEY:{}@bucket/x?region=eu", "s3://KEY@bucket/x?region=eu"),
        (
            "postgresql+psycopg2://me:{}@db/name?password={}&sslmode=require",
            "postgresql+psycopg2://me@db/name?sslmode=require",
        ),
        ("https://a.example/x?X-Amz-Credential={}&X-Amz-Signature={}", "https://a.example/x"),
        ("https://a.example/x?a=1&Session_Token={}&b=2#c", "https://a.example/x?a=1&b=2#c"),
        ("https://a.example/x?a=1&sig={}#c", "https://a.example/x?a=1#c"),
        ("('http://a:{}@b', 's3://a:{}@b') failed", "('http://b', 's3://a@b') failed"),
        (
            "request to http://a:{}@b:1/api with url: /api?token={} (refused)",
            "request to http://b:1/api with url: /api (refused)",
        ),
    ],
)
def test_f90_a_text_is_shown_without_the_credentials_of_its_uris(text: str, shown: str) -> None:
    for secret in ("c4n4ry", "c4n:4ry%40", CANARY.replace("/", "%2F")):
        assert without_credentials(text.replace("{}", secret)) == shown


def test_f90_a_secret_key_of_s3_may_contain_slashes() -> None:
    assert without_credentials(f"s3://KEY:{CANARY}@bucket/x") == "s3://KEY@bucket/x"


@pytest.mark.parametrize(
    "text",
    [
        "http://a.example:8080/@user/x",
        "http://[::1]:80/a@b",
        "sqlite:////data/a:b@c/mlflow.db",
        "abfss://container@account.example/x",
        "gs://anonymous@bucket/x",
        "https://a.example/x?size=3&page=2",
        "prior.trainer.tokens=3 at 12:30@home",
        "",
    ],
)
def test_other_texts_are_shown_as_they_are(text: str) -> None:
    assert without_credentials(text) == text


def test_f92_an_error_without_a_message_has_its_type_as_reason() -> None:
    assert [reason_of(error) for error in (OSError(), ValueError(" \n"), TimeoutError())] == [
        "OSError",
        "ValueError",
        "TimeoutError",
    ]
    assert reason_of(ValueError("first\nlast\n")) == "first" and reason_of(ValueError("first\nlast\n"), -1) == "last"
    assert reason_of(OSError("http://a:b@c refused")) == "http://c refused"


@dataclasses.dataclass(frozen=True)
class Inner:
    uris: tuple[str, ...] = ("http://a:c4n4ry@b",)


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    named: dict[str, Inner] = dataclasses.field(default_factory=lambda: {"x": Inner()})
    number: float = 0.5


def test_f90_a_configuration_is_recorded_without_credentials() -> None:
    assert to_dict(Outer()) == {
        "inner": {"uris": ["http://b"]},
        "named": {"x": {"uris": ["http://b"]}},
        "number": 0.5,
    }
    assert "c4n4ry" not in json.dumps(to_dict(Outer())) and Outer().inner.uris == ("http://a:c4n4ry@b",)


@pytest.mark.parametrize("uri", ["s3://KEY:c4n4ry@bucket/x", "s3://bucket/x?secret_key=c4n4ry"])
def test_f90_files_are_not_read_from_a_uri_with_credentials(uri: str) -> None:
    with pytest.raises(
        StorageError, match=r"^s3://(KEY@)?bucket/x: given with credentials.*AWS_SECRET_ACCESS_KEY"
    ) as error:
        files.read(uri)
    assert "c4n4ry" not in str(error.value)
