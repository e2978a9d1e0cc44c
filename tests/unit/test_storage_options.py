"""`storage_options` of a source, and what must not stand in a recipe."""

from __future__ import annotations

import json

import pytest

from ftlaunch.distributed import storage
from ftlaunch.recipes.compare import compare
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.load import load_recipe
from ftlaunch.recipes.redact import redact


def recipe_file(folder, source=None, **sections):
    recipe = {"model": {"path": "m"}, "data": {"train": [{"path": "s3://acme/a.jsonl", **(source or {})}]}, **sections}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def problems(folder, source=None, environ=None, **sections):
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file(folder, source, **sections), environ=environ or {})
    return str(caught.value)


def test_options_reach_the_recipe_as_they_are(tmp_path):
    options = {"endpoint_url": "http://minio:9000", "requester_pays": True, "client_kwargs": {"region_name": "eu-1"}}
    recipe = load_recipe(recipe_file(tmp_path, {"storage_options": options}), environ={}).recipe
    assert recipe.data.train[0].storage_options == options
    assert json.loads(storage.options_text(options)) == options


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"key": "AKIA", "anon": True}, "key"),
        ({"secret": "x"}, "secret"),
        ({"token": "x"}, "token"),
        ({"account_key": "x"}, "account_key"),
        ({"client_kwargs": {"aws_secret_access_key": "x"}}, "client_kwargs.aws_secret_access_key"),
        ({"headers": {"Authorization": "Bearer x"}}, "headers.Authorization"),
        ({"connection_string": "x"}, "connection_string"),
        ({"password": "${STORE_PASSWORD}"}, "password"),
    ],
)
def test_credentials_in_options_are_refused_with_the_variables_to_set(tmp_path, options, key):
    said = problems(tmp_path, {"storage_options": options}, environ={"STORE_PASSWORD": "hunter2secret"})
    assert f"data.train.0.storage_options.{key}" in said
    assert "AWS_ACCESS_KEY_ID" in said
    assert "hunter2secret" not in said


@pytest.mark.parametrize("token", ["anon", "cloud", "google_default"])
def test_where_google_credentials_come_from_is_no_credential(tmp_path, token):
    path = recipe_file(tmp_path, {"path": "gs://acme/a.jsonl", "storage_options": {"token": token}})
    assert load_recipe(path, environ={}).recipe.data.train[0].storage_options == {"token": token}


def test_options_of_local_files_are_refused(tmp_path):
    assert "means nothing for local files" in problems(tmp_path, {"path": "a", "storage_options": {"anon": True}})


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2secret@host/a.jsonl",
        "https://hunter2secret@host/a.jsonl",
        "https://host/a.jsonl?versionId=1&X-Amz-Signature=hunter2secret",
        "https://host/a.jsonl?sig=hunter2secret",
    ],
)
def test_urls_with_credentials_are_refused_and_never_shown(tmp_path, url):
    said = problems(tmp_path, {"path": url}, checkpoint={"path": url})
    assert "data.train.0.path" in said
    assert "checkpoint.path" in said
    assert ".netrc" in said
    assert "hunter2secret" not in said
    assert "hunter2secret" not in redact(f"cannot read {url}: gone", ())


def test_plain_urls_stay_as_they_are():
    for text in ("s3://acme/a@b:c/d.jsonl?versionId=1", "http://host:9000/a", "sftp://me@host/a", "a: b@c"):
        assert redact(text, ()) == text


def test_an_unknown_option_has_a_near_name():
    with pytest.raises(UserError, match=r"storage_options\.endpoint_uri.*did you mean endpoint_url"):
        storage.read_file(storage.FileInfo("s3://acme/a", 1, "x", storage.options_text({"endpoint_uri": "http://x"})))


def test_other_options_go_on_with_the_run(tmp_path):
    old = load_recipe(recipe_file(tmp_path), environ={}).recipe
    new = load_recipe(recipe_file(tmp_path, {"storage_options": {"endpoint_url": "http://x"}}), environ={}).recipe
    comparison = compare(old, new)
    assert [change.key for change in comparison.continues] == ["data.train.0.storage_options.endpoint_url"]
    assert comparison.stops == ()
