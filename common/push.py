"""Uploads a weights folder to the Hugging Face hub, with a model card."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from heirloom.common.card import card, facts, warn_of_paths
from heirloom.common.checkpoint.family import Donor
from heirloom.common.errors import InputError, remark
from heirloom.common.files import staged

CARD = "README.md"
AGAIN = "the same command continues"
RECORDS = "provenance.json, verify.json or scores.json, or sources.json of the run"
T = TypeVar("T")


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, or would be. files: bytes by name. url: of the model. commit: its address, empty for none."""

    url: str
    files: dict[str, int]
    commit: str = ""


def repository(destination: str) -> str:
    """Returns "org/name" of hf:org/name. Raises InputError for another form."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = destination.removeprefix("hf:")
    try:
        validate_repo_id(name)
        if not destination.startswith("hf:") or name.count("/") != 1:
            raise HFValidationError("it has another form")
    except HFValidationError as error:
        why = str(error).splitlines()[0]
        raise InputError(f"{destination}: cannot be a model on the hub ({why}); write hf:org/name") from error
    return name


def push(
    folder: Path, donor: Donor, destination: str, *, private: bool = False, license: str = "", dry_run: bool = False
) -> Pushed:
    """Writes the card into a folder and uploads all files there in one commit.

    donor: the model in it, opened. destination: hf:org/name; the repository is created where it does not exist. A
    README.md that is there is kept. private: the repository must not be public. license: an id of the hub, for the
    card. dry_run: uploads nothing. Raises InputError without a token, and for whatever the hub refuses.
    """
    from huggingface_hub import constants

    name = repository(destination)
    url = f"{constants.ENDPOINT}/{name}"
    if (folder / CARD).is_file():
        remark(f"{folder / CARD} is kept as it is; remove it to have it written again")
    else:
        if not license:
            remark(f"license: not known, so {folder / CARD} names none; give --license ID, such as mit")
        text = _card(donor, name, license)
        with staged(folder / CARD) as file:
            file.write_text(text)
    warn_of_paths(folder)
    files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in _files(folder)}
    if dry_run:
        return Pushed(url, files)
    return Pushed(url, files, _upload(folder, name, list(files), private))


def _card(donor: Donor, name: str, license: str) -> str:
    try:
        return card(facts(donor), name, license)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # JSON of another form than ours
        found = f"a JSON file has other content than heirloom writes ({type(error).__name__}: {error})"
        raise InputError(f"{donor.folder}: {found}; remove the damaged one: {RECORDS}") from error


def _files(folder: Path) -> list[Path]:
    """Returns all files but hidden ones, such as what an interrupted command left."""
    found = (file for file in folder.rglob("*") if file.is_file())
    return sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts))


def _upload(folder: Path, name: str, files: list[str], private: bool) -> str:
    """Creates the repository if needed and commits the files; returns the address of the commit."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not get_token():
        raise InputError("the hub wants a token: set HF_TOKEN to one that may write, or type `hf auth login`")
    api = HfApi()
    _asked(name, "created", lambda: api.create_repo(name, private=private or None, exist_ok=True))
    if private and not _asked(name, "found", lambda: api.model_info(name)).private:
        raise InputError(f"hf:{name} exists and is public; make it private in its settings, or give another name")
    operations = [CommitOperationAdd(file, folder / file) for file in files]
    message = "Upload with heirloom"
    commit: Any = _asked(name, "uploaded", lambda: api.create_commit(name, operations, commit_message=message))
    return str(commit.commit_url)


def _asked(name: str, what: str, call: Callable[[], T]) -> T:
    """Calls the hub; its errors, the network's and the disk's become one line."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return call()
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = str(getattr(error, "server_message", None) or str(error)).strip().splitlines()[0][:200]
        advice = {
            401: "the token is not valid; set HF_TOKEN to one that may write",
            403: "the token may not write there; give one with write access, or another name",
            404: "there is no such place, or the token may not see it; check org and name",
        }
        why = advice.get(status, f"try again; {AGAIN}")
        raise InputError(f"hf:{name} could not be {what} (the hub says {status}: {said}): {why}") from error
    except Exception as error:  # httpx's errors, the client's ValueErrors, OSErrors of files: all end the upload
        text = " ".join(str(error).split())[:200] or type(error).__name__
        first = "correct it" if isinstance(error, ValueError) else "check the network"
        raise InputError(f"hf:{name} could not be {what} ({text}); {first}, then {AGAIN}") from error
