"""Models on the Hugging Face hub: their files are downloaded to the hub's cache, or found there.

`huggingface_hub` handles the cache, the endpoint, tokens and the offline mode. This module chooses the files of a
repository, and explains what to do if they cannot be downloaded. Small files are downloaded first, so that an
unsupported model is refused before gigabytes of weights are downloaded.
"""

import errno
import functools
import os
import re
from pathlib import Path

from jaxgen.checkpoint import float8
from jaxgen.checkpoint.files import CheckpointError, holds
from jaxgen.checkpoint.folder import INDEX, SINGLE_FILE, listed, read_configs
from jaxgen.checkpoint.source import parse_config

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_SMALL = ["*.json", "*.model", "*.spm", "*.txt", "*.jinja", "LICENSE*", "README.md"]
_WEIGHTS = ["*.safetensors"]
_PICKLES = ["*.bin", "*.pth"]
# Not downloaded: other models, and the same model in other formats. Patterns of huggingface_hub also match files in
# subfolders. The only subfolder with files of the model itself holds additional chat templates.
_IGNORED = [f"*/{pattern}" for pattern in ("*.json", "*.model", "*.spm", "*.txt", *_WEIGHTS, *_PICKLES)]
_IGNORED += ["consolidated*.safetensors"]


def local_path(model: str | Path, revision: str | None = None, *, weights: bool = True, pickles: bool = False) -> Path:
    """The path itself, or for a name on the hub its folder in the hub's cache, downloaded if needed.

    Args:
        model: a path, or the name of a model on the Hugging Face hub, "owner/name". An existing path always wins over a
            name, and a `Path` is never downloaded.
        revision: a branch, a tag or a commit of the model on the hub; "main" by default.
        weights: whether to download the weights, and not only configs and tokenizer.
        pickles: whether to download pickles too; they may then be the only weights.

    Raises:
        CheckpointError: if `model` is neither a path nor a name, if it cannot be downloaded, or if jaxgen cannot read
            what the repository holds.
        ValueError: if a revision is passed with a path, or is empty.
    """
    if not isinstance(model, str) or os.path.exists(model):
        if revision is not None:
            raise ValueError(
                f"`revision`={revision!r} (--revision) is only for models on the hub, but {model} is a path. Leave it "
                "out."
            )
        return Path(model)
    if revision is not None and not str(revision).strip():
        raise ValueError(f"`revision`={revision!r} (--revision) must be a branch, a tag or a commit.")
    if not _NAME.fullmatch(model) or model.endswith(".gguf"):
        raise CheckpointError(_neither(model))
    cached = False
    try:
        folder = _snapshot(model, revision, _SMALL)
        cached = (folder / "config.json").exists()
        if not weights:
            return folder
        _check_configs(model, folder, pickles)
        # From the same commit, even if the branch has moved meanwhile.
        _snapshot(model, folder.name, [*_SMALL, *_WEIGHTS, *(_PICKLES if pickles else [])])
        if not pickles and not holds(folder, INDEX) and not holds(folder, SINGLE_FILE):
            raise CheckpointError(_instead(model, folder, f"{SINGLE_FILE} or {INDEX}"))
    except CheckpointError:
        raise
    except Exception as error:  # errors of the hub, of HTTP, of the network or the disk
        raise CheckpointError(_reason(model, revision, error, cached)) from error
    return folder


def commit_of(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache; None for any other folder."""
    # models--owner--name/snapshots/COMMIT
    return folder.name if folder.parent.name == "snapshots" else None


def _snapshot(model: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder in the hub's cache with the files that match the patterns, downloaded if needed."""
    from huggingface_hub import errors, snapshot_download

    download = functools.partial(
        snapshot_download, model, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED
    )
    network_error = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]  # of httpx or httpx2
    try:
        return Path(download())
    except (errors.OfflineModeIsEnabled, network_error) as error:
        if isinstance(error, errors.HfHubHTTPError):
            raise
        # Some releases, such as 1.31, ask the hub even about a commit that is in the cache.
        try:
            return Path(download(local_files_only=True))
        except errors.LocalEntryNotFoundError as missing:
            raise missing from error


def _check_configs(model: str, folder: Path, pickles: bool) -> None:
    """Raises CheckpointError if the configs show that the model cannot be loaded."""
    if holds(folder, "adapter_config.json"):
        raise CheckpointError(
            f"{model} is a LoRA adapter, not a model. `hf download {model}` downloads it and prints its folder, and "
            "`jaxgen convert BASE DST --merge-lora FOLDER` merges it into its base model."
        )
    if not holds(folder, "config.json"):
        if pickles:  # as Meta distributes them
            return
        raise CheckpointError(_instead(model, folder, "config.json"))
    raw, generation = read_configs(folder)
    try:
        parse_config({key: value for key, value in raw.items() if key not in float8.KEYS}, generation)
        for key in float8.KEYS:
            if raw.get(key):
                float8.block_size(raw[key])
    except ValueError as error:
        raise CheckpointError(f"{model}: {error}") from error


def _neither(model: str) -> str:
    return (
        f"{model!r} is neither an existing path nor the name of a model on the Hugging Face hub, which has the form "
        "owner/name."
    )


def _instead(model: str, folder: Path, missing: str) -> str:
    """Explains why a repository without the file `missing` cannot be loaded: what it holds instead, and what to do."""
    from huggingface_hub import HfApi

    try:
        files = sorted(HfApi().list_repo_files(model, revision=folder.name))
    except Exception:  # offline, a repository that lacks a file looks like one that was downloaded in part
        return f"{folder} has no {missing}, and the hub cannot be asked. {_elsewhere(model, folder.name)}"
    if pickles := [file for file in files if file.endswith((".bin", ".pth", ".pt")) and "/" not in file]:
        return (
            f"{model} has no safetensors, but pickles: {listed(pickles)}. Pickles can run code, so only `jaxgen "
            f"convert --allow-pickle {model} DST` reads them."
        )
    if ggufs := [file for file in files if file.endswith(".gguf")]:
        return (
            f"{model} holds {listed(ggufs)} and no safetensors. Download one of these files, for example with `hf "
            f"download {model} {ggufs[0]:.200}`, and pass its path."
        )
    return f"{model} has no {missing}, but {listed(files)}. Pass a model with config.json and safetensors."


def _reason(model: str, revision: str | None, error: Exception, cached: bool) -> str:
    """Explains an error of huggingface_hub to the user: what it means, and what to do.

    Args:
        cached: whether the model's small files are in the cache.
    """
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{model}"
    said = next(iter(str(error).strip().splitlines()), "") or repr(error)
    if isinstance(error, errors.HFValidationError):
        return _neither(model)
    if isinstance(error, errors.GatedRepoError):
        return f"{model} is gated. Accept its terms at {page}, then log in with `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        if kind := _other_kind(model):
            return f"{model} is a {kind} on the hub, not a model. Pass the name of a model."
        return (
            f"{model} is not an existing path, and the hub has no public model of this name. It may be private. Check "
            "the name, or log in with `hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{model} has no revision {revision!r}. Pass a branch, a tag or a commit; {page}/commits/main lists the "
            "commits."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = f"the hub cannot be reached ({error.__cause__!r:.300})"
        if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            reason = "the hub is not asked, since HF_HUB_OFFLINE is set"
        part = cached or isinstance(error, getattr(errors, "IncompleteSnapshotError", ()))  # older releases lack it
        where = "only in part in" if part else "neither an existing path nor in"
        return f"{model} is {where} the cache {constants.HF_HUB_CACHE}, and {reason}. {_elsewhere(model, revision)}"
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in said:  # Xet raises a RuntimeError
        return (
            f"The disk of {constants.HF_HUB_CACHE} is full, so {model} cannot be downloaded. Make room, or set HF_HOME "
            "to a folder on another disk; files that are complete are kept."
        )
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"The hub does not give you {model} ({said}). Log in with `hf auth login` and a token that may read it."
    return f"{model} cannot be downloaded ({said}). Try again: files that are complete are kept."


def _other_kind(model: str) -> str | None:
    """The kind of repository under this name, if it is a dataset or a space."""
    from huggingface_hub import HfApi

    try:
        return next((kind for kind in ("dataset", "space") if HfApi().repo_exists(model, repo_type=kind)), None)
    except Exception:  # it only helps to explain another error
        return None


def _elsewhere(model: str, revision: str | None) -> str:
    command = f"hf download {model}" + ("" if revision is None else f" --revision {revision}")
    return f"On a machine with a network, `{command}` downloads it to the cache, which can be copied to this machine."
