"""Where a SOURCE is: a local path, or `hf:org/name[@revision]` fetched once into the Hugging Face cache."""

from pathlib import Path

from common.errors import InputError

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_OTHER = ("*.json", "*.txt", "*.model")


def locate(source: str) -> Path:
    """The local file or folder of a SOURCE. Raises InputError when it is not there or cannot be fetched."""
    if not source.startswith("hf:"):
        path = Path(source).expanduser()
        if not path.exists():
            raise InputError(f"{source}: no such file or folder (a Hugging Face model is written hf:org/name)")
        return path
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = source.removeprefix("hf:").partition("@")
    try:
        files = HfApi().list_repo_files(name, revision=revision or None)
        # Safetensors where there are any; pickles only where there is nothing else.
        weights = _WEIGHTS if any(f.endswith(".safetensors") for f in files) else ("*.bin", "*.pt", "*.pth")
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=[*weights, *_OTHER]))
    except Exception as error:  # the hub's client raises its own, httpx's and OSError alike: all mean it could not be had
        cached = _cached(name, revision)
        if cached is not None:
            return cached
        raise InputError(f"{source}: could not be fetched ({str(error).splitlines()[0][:200]}); check name and network") from error


def _cached(name: str, revision: str) -> Path | None:
    """The snapshot that an earlier fetch left, for work without a network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None
