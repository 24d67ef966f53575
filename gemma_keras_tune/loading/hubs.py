"""Downloads from Hugging Face and Kaggle, and their errors in plain words."""

import dataclasses
import importlib
import os
import pathlib
import re
from collections.abc import Iterator

from gemma_keras_tune.errors import LoadError
from gemma_keras_tune.gemma.templates import SIDECAR

_DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class Hub:
    """A place that models are downloaded from.

    Attributes:
        title: Its name.
        address: Its host.
        client: The package that downloads.
        page: The address of a model's page, with `{0}` for its name.
        credentials: The ways to sign in, as a part of a sentence.
    """

    title: str
    address: str
    client: str
    page: str
    credentials: str


HUBS = {
    "hf": Hub(
        "Hugging Face",
        "huggingface.co",
        "huggingface_hub",
        "https://huggingface.co/{0}",
        "sign in with `hf auth login`, or set HF_TOKEN",
    ),
    "kaggle": Hub(
        "Kaggle",
        "kaggle.com",
        "kagglehub",
        "https://www.kaggle.com/models/{0}",
        "sign in with `kagglehub.login()`, or set KAGGLE_USERNAME and KAGGLE_KEY",
    ),
}
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KAGGLE_KEY", "KAGGLE_API_TOKEN")


def download_config(scheme: str, rest: str) -> str:
    """Download the file `config.json` of a model alone, and return its path."""
    client = importlib.import_module(HUBS[scheme].client)
    if scheme == "hf":
        if not isinstance(client.try_to_load_from_cache(rest, "config.json"), str):
            # Asks once; the download would ask again and again where there is no network.
            client.get_hf_file_metadata(client.hf_hub_url(rest, "config.json"))
        return client.hf_hub_download(repo_id=rest, filename="config.json")
    return client.model_download(rest, "config.json")


def download_folder(repository: str) -> str:
    """Download a model from Hugging Face, without pickles and code, and return its folder."""
    client = importlib.import_module("huggingface_hub")
    return client.snapshot_download(repo_id=repository, allow_patterns=list(_DOWNLOADED))


def download_record(scheme: str, rest: str) -> pathlib.Path | None:
    """Download the metadata that this library writes, and return its folder; `None` without one."""
    client = importlib.import_module(HUBS[scheme].client)
    if scheme == "hf":
        folder = pathlib.Path(client.snapshot_download(repo_id=rest, allow_patterns=[SIDECAR]))
        return folder if (folder / SIDECAR).is_file() else None
    try:
        return pathlib.Path(client.model_download(rest, SIDECAR)).parent
    except Exception:  # it has no exception of its own for a file that is not there
        return None


def hub_error(source: str, rest: str, hub: Hub, error: Exception) -> LoadError:
    """Turn an error of a hub's client into one that names the next step, without secrets.

    Args:
        source: The source that the user passed.
        rest: Its part after `://`.
        hub: The hub.
        error: The error of the client, or of KerasHub around it.

    Returns:
        The error to raise.
    """
    problems = [f"{type(error).__name__}: {_without_secrets(str(error))}"]
    names = {cls.__name__ for link in _chain(error) for cls in type(link).__mro__}
    text = " ".join(str(link) for link in _chain(error))
    page = hub.page.format(rest)
    if "ModuleNotFoundError" in names:
        return LoadError(
            f"{source} needs the client of {hub.title}, which is not installed.",
            problems,
            next_step=f"Install it: pip install {hub.client}",
        )
    # Hugging Face answers 401 for a name it does not know, too.
    unknown = "RepositoryNotFoundError" in names and "GatedRepoError" not in names
    denied = names & {"GatedRepoError", "UnauthenticatedError", "CredentialError"}
    if not unknown and (denied or re.search(r"\b40[13] Client Error", text)):
        return LoadError(
            f"{hub.title} does not give {source} to you: the model is gated or private.",
            problems,
            next_step=f"Accept its terms at {page}, then {hub.credentials}.",
        )
    if unknown or re.search(r"\b404 Client Error", text):
        return LoadError(
            f"{hub.title} has no model {source}, or it is private.",
            problems,
            next_step=f"Check the name at {page}; for a private model, {hub.credentials}.",
        )
    if names & {"ConnectionError", "Timeout", "TimeoutError", "TransportError",
                "LocalEntryNotFoundError", "OfflineModeIsEnabled"}:  # fmt: skip
        return LoadError(
            f"{hub.title} ({hub.address}) cannot be reached, and {source} is not in its cache.",
            problems,
            next_step="Check the network, or load a folder, a .gguf file or "
            "'package://gemma3_270m', which need none.",
        )
    if names & {"EntryNotFoundError", "FileNotFoundError"}:
        return LoadError(
            f"{source} on {hub.title} lacks a file that a model needs.",
            problems,
            next_step=f"See what it holds at {page}.",
        )
    return LoadError(f"{source} cannot be loaded from {hub.title}.", problems)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _without_secrets(text: str) -> str:
    for name in _SECRETS:
        secret = os.environ.get(name)
        if secret:
            text = text.replace(secret, f"<{name}>")
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", "<token>", text)
