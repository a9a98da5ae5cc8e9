"""Statistics on the Hugging Face hub, with a folder in its place."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import tiny_model
from corpora import assert_same, measured, write
from huggingface_hub import errors
from test_container import Tokenizer, same

from llama_attn import AttentionStats
from llama_attn.corpus import CorpusSummary


@pytest.fixture
def stats(ids):
    with torch.no_grad():
        stats = tiny_model()(ids, output_attention_stats=True).attention_stats
    return stats.with_tokens(Tokenizer(), ids)


class Hub:
    """A folder that answers as the hub does, and remembers what it was asked."""

    def __init__(self, folder):
        self.folder = folder
        self.calls = []

    def path(self, repo_type, repo_id, filename):
        return self.folder / repo_type / repo_id / filename

    def make_api(self, **options):
        self.calls.append(("HfApi", options))
        return SimpleNamespace(create_repo=self.create_repo, upload_file=self.upload_file)

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        self.calls.append(("create_repo", {"private": private}))
        self.path(repo_type, repo_id, "").mkdir(parents=True, exist_ok=exist_ok)

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, repo_type, revision, commit_message):
        self.calls.append(("upload_file", {"revision": revision, "commit_message": commit_message}))
        shutil.copy(path_or_fileobj, self.path(repo_type, repo_id, path_in_repo))
        return SimpleNamespace(commit_url=f"https://hub/{repo_type}/{repo_id}/commit/1")

    def download(self, repo_id, filename, *, repo_type, revision, token, library_name):
        self.calls.append(("download", {"revision": revision, "token": token, "library_name": library_name}))
        return str(self.path(repo_type, repo_id, filename))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.make_api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    return hub


def test_there_and_back(stats, hub):
    assert stats.push_to_hub("me/run") == "https://hub/dataset/me/run/commit/1"
    assert [path.name for path in (hub.folder / "dataset/me/run").iterdir()] == ["stats.safetensors"]
    assert same(AttentionStats.from_hub("me/run"), stats)
    stats.push_to_hub("me/run")
    assert hub.calls[1] == ("create_repo", {"private": None})


def test_every_option_reaches_the_hub(stats, hub):
    stats.push_to_hub(
        "me/llama", "layer5.safetensors", repo_type="model", revision="dev", private=True, token="hf_x",  # noqa: S106
        commit_message="first",
    )  # fmt: skip
    found = AttentionStats.from_hub(
        "me/llama", "layer5.safetensors", repo_type="model", revision="dev", token="hf_y"  # noqa: S106
    )  # fmt: skip
    assert same(found, stats)
    assert hub.calls == [
        ("HfApi", {"library_name": "llama_attn", "token": "hf_x"}),
        ("create_repo", {"private": True}),
        ("upload_file", {"revision": "dev", "commit_message": "first"}),
        ("download", {"revision": "dev", "token": "hf_y", "library_name": "llama_attn"}),
    ]


def test_the_calls_are_those_of_the_library():
    """The folder above takes what the hub takes: its signatures are bound with the same arguments."""
    import inspect

    create, upload = (inspect.signature(getattr(huggingface_hub.HfApi, f)) for f in ("create_repo", "upload_file"))
    create.bind(None, "me/run", repo_type="dataset", private=None, exist_ok=True)
    upload.bind(
        None, path_or_fileobj="x", path_in_repo="x", repo_id="me/run", repo_type="dataset", revision=None,
        commit_message="x",
    )  # fmt: skip
    download = inspect.signature(huggingface_hub.hf_hub_download)
    download.bind("me/run", "x", repo_type="dataset", revision=None, token=None, library_name="llama_attn")
    inspect.signature(huggingface_hub.HfApi).bind(library_name="llama_attn", token=None)


def test_what_comes_from_the_hub_is_checked(stats, hub):
    stats.push_to_hub("me/run")
    path = hub.path("dataset", "me/run", "stats.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        AttentionStats.from_hub("me/run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filename": "stats.bin"}, r"filename: expected a name that ends in \.safetensors, got 'stats.bin'"),
        ({"repo_type": "space"}, "repo_type: expected 'dataset' or 'model', got 'space'"),
    ],
)
def test_bad_arguments(arguments, message, stats, hub):
    for call in (stats.push_to_hub, AttentionStats.from_hub):
        with pytest.raises(ValueError, match=message):
            call("me/run", **arguments)
    assert hub.calls == []


def test_bad_names_of_repositories(stats):
    for call in (stats.push_to_hub, AttentionStats.from_hub):
        with pytest.raises(ValueError, match="Repo id must be in the form"):
            call("a/b/c")


def test_offline(stats):
    """The library itself, which the tests run offline."""
    message = "'stats.safetensors' of the dataset repository 'me/run' is not in the local cache, and the hub cannot be"
    with pytest.raises(FileNotFoundError, match=message):
        AttentionStats.from_hub("me/run")
    with pytest.raises(OSError, match="offline mode is enabled"):
        stats.push_to_hub("me/run")


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RemoteEntryNotFoundError("404", response=RESPONSE), "filename: the dataset repository 'me/run' has no file 'stats.s"),
        (errors.RevisionNotFoundError("404", response=RESPONSE), "revision: the dataset repository 'me/run' has no revision 'v2'"),
        (errors.RepositoryNotFoundError("404", response=RESPONSE), "there is no dataset repository 'me/run', or the token may not"),
        (errors.GatedRepoError("ask first", response=RESPONSE), "or the token may not read it: ask first"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_not_on_the_hub(error, message, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(FileNotFoundError, match=message):
        AttentionStats.from_hub("me/run", revision="v2")


def test_the_summary_of_a_corpus_has_a_name_of_its_own(hub, tmp_path):
    write(tmp_path / "texts", parts=1, count=5)
    summary = measured(tmp_path / "texts", tmp_path / "run")
    summary.push_to_hub("me/run")
    assert [path.name for path in (hub.folder / "dataset/me/run").iterdir()] == ["summary.safetensors"]
    assert_same(CorpusSummary.from_hub("me/run"), summary)
