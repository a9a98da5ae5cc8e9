"""Saved statistics on the Hugging Face hub."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Literal, Self

RepoType = Literal["dataset", "model"]


class HubMixin(ABC):
    """What can be saved to one file and loaded from it can be pushed to the hub and read from there."""

    hub_filename: ClassVar[str] = "stats.safetensors"

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote."""

    def push_to_hub(
        self,
        repo_id: str,
        filename: str | None = None,
        *,
        repo_type: RepoType = "dataset",
        revision: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload what `save` writes to the Hugging Face hub; the repository is made if it does not exist.

        Args:
            repo_id: ``"user/name"``.
            filename: Name of the file in the repository; None for ``stats.safetensors``, or ``summary.safetensors`` of a
                corpus.
            repo_type: ``"dataset"``, or ``"model"`` to put the file beside a model's weights.
            revision: Branch to commit to; None for the main one.
            private: Whether a new repository is private; None for the account's default.
            token: Access token; None for that of ``hf auth login``.
            commit_message: None for one that names the file.

        Returns:
            Address of the commit.

        Raises:
            ValueError: An argument is not what the hub takes.
            OSError: The hub cannot be reached or refuses; the message is its own.
        """
        from huggingface_hub import HfApi

        filename = self.hub_filename if filename is None else filename
        _check(filename, repo_type)
        hub = HfApi(library_name="llama_attn", token=token)
        # First of all, since it finds out whether the hub is there and the token may write.
        hub.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.hub_filename
            self.save(path)
            commit = hub.upload_file(
                path_or_fileobj=path,
                path_in_repo=filename,
                repo_id=repo_id,
                repo_type=repo_type,
                revision=revision,
                commit_message=commit_message or f"Attention statistics: {filename}",
            )
        return commit.commit_url

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        filename: str | None = None,
        *,
        repo_type: RepoType = "dataset",
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """Read what `push_to_hub` uploaded, with the checks of `load`; what is in the local cache is not fetched again.

        Args:
            repo_id: ``"user/name"``.
            filename: Name of the file in the repository; None for ``stats.safetensors``, or ``summary.safetensors`` of a
                corpus.
            repo_type: ``"dataset"`` or ``"model"``.
            revision: Branch, tag or commit; None for the main branch.
            token: Access token; None for that of ``hf auth login``.

        Raises:
            FileNotFoundError: There is no such repository, revision or file, or the hub cannot be reached.
            ValueError: An argument is not what the hub takes, or the file was not written by `save`.
        """
        from huggingface_hub import errors, hf_hub_download

        filename = cls.hub_filename if filename is None else filename
        _check(filename, repo_type)
        where = f"{repo_type} repository {repo_id!r}"
        try:
            path = hf_hub_download(
                repo_id, filename, repo_type=repo_type, revision=revision, token=token, library_name="llama_attn"
            )
        except errors.LocalEntryNotFoundError as error:
            raise FileNotFoundError(
                f"repo_id: {filename!r} of the {where} is not in the local cache, and the hub cannot be reached "
                "(no connection, or HF_HUB_OFFLINE is set)"
            ) from error
        except errors.EntryNotFoundError as error:
            raise FileNotFoundError(f"filename: the {where} has no file {filename!r}") from error
        except errors.RevisionNotFoundError as error:
            raise FileNotFoundError(f"revision: the {where} has no revision {revision!r}") from error
        except errors.RepositoryNotFoundError as error:
            raise FileNotFoundError(f"repo_id: there is no {where}, or the token may not read it: {error}") from error
        return cls.load(path)


def _check(filename: str, repo_type: str) -> None:
    """Check what the hub itself would take."""
    if not filename.endswith(".safetensors"):
        raise ValueError(f"filename: expected a name that ends in .safetensors, got {filename!r}")
    if repo_type not in ("dataset", "model"):
        raise ValueError(f"repo_type: expected 'dataset' or 'model', got {repo_type!r}")
