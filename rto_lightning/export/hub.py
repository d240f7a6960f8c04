"""Put an exported folder on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from rto_lightning.errors import UserError, first_line

_LOGIN = "run `hf auth login` or set HF_TOKEN to a token that may write"


def check_push(name: str) -> None:
    """Refuse a push that cannot work, before anything is computed.

    Raises:
        UserError: if the name is none, or nobody is logged in.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {name} is no name on the hub; give it as USER/NAME.") from error
    if name.count("/") != 1:
        raise UserError(f"--push_to_hub {name} names no owner; give it as USER/NAME.")
    if get_token() is None:
        raise UserError(f"--push_to_hub needs a login on the Hugging Face hub; {_LOGIN}.")


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a folder; the repository is made if it is not there.

    Args:
        folder: what to upload.
        name: USER/NAME.
        private: whether a new repository is private.

    Returns:
        Its address.

    Raises:
        UserError: if the hub refuses it or is out of reach; the folder stays.
    """
    api = HfApi()
    try:
        address = str(api.create_repo(name, private=private, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of rto-lightning")
    except LocalTokenNotFoundError as error:
        raise UserError(f"nobody is logged in on the Hugging Face hub; {_LOGIN}. The export is in {folder}.") from error
    except Exception as error:  # of the client, of its HTTP library, of the disk
        status = getattr(getattr(error, "response", None), "status_code", None)
        cure = _LOGIN if status in (401, 403) else f"then run `hf upload {name} {folder}`"
        raise UserError(
            f"the hub did not take {name} ({first_line(error)}); {cure}. The export is in {folder}."
        ) from error
    return address
