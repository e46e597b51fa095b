"""What must not reach the record."""

import pytest

from flows.record import scrub


@pytest.mark.parametrize(
    "name",
    [
        *("DB_PASSWORD", "hf.token", "AWS_SECRET_ACCESS_KEY", "aws_access_key_id", "secretKey"),
        *("PREFECT_API_AUTH_STRING", "env.WANDB_API_KEY", "credentials", "private-key"),
    ],
)
def test_names_of_secrets(name):
    assert scrub.is_secret_name(name)
    assert scrub.value(name, "abc") == scrub.HIDDEN


@pytest.mark.parametrize(
    "name", ["text.tokens", "max_tokens", "author", "monkey", "key", "fingerprint", "patience"]
)
def test_names_that_only_sound_like_it(name):
    assert scrub.value(name, 7) == "7"


def test_what_is_not_set_is_shown_as_such():
    assert [scrub.value("password", value) for value in (None, "", False)] == ["None", "", "False"]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://key:pass@host/bucket", "s3://host/bucket"),
        ("https://h/x?a=1&X-Amz-Signature=abc&b=2", "https://h/x?a=1&X-Amz-Signature=<hidden>&b=2"),
        ('{"api_key": "a\\"b", "n": 1}', '{"api_key": "<hidden>", "n": 1}'),
        ("write to someone@example.org", "write to someone@example.org"),
    ],
)
def test_texts_lose_credentials_and_nothing_else(text, clean):
    assert scrub.text(text) == clean


def test_values_of_our_own_secret_variables_are_found_anywhere(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "abcdefgh12345")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert scrub.text("it is abcdefgh12345, abc") == "it is <hidden>, abc"
