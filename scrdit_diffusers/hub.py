"""Publishing on the Hub: access is checked before work is spent, and errors say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # of the HTTP library that huggingface_hub uses

_LOG_IN = "log in by `hf auth login` or pass token=..., with a token that may write"
_ADVICE = {
    401: f"The Hub does not know the token, or there is none: {_LOG_IN}.",
    403: (
        f"The account may not write there: choose a repository of your own or of your organisation, or {_LOG_IN}; "
        "or its storage is full, if the library says so below: free some."
    ),
    404: f"There is no such repository, or the account may not see it: {_LOG_IN}.",
}


@contextmanager
def explain_push(repo_id: str, kept: str = "") -> Iterator[None]:
    """Make the errors of publishing, done inside, clear.

    Parameters
    ----------
    repo_id
        Repository that is written.
    kept
        What is not lost, and how to publish it later; ends the message.

    Raises
    ------
    OSError
        The Hub refused, or cannot be reached: with the repository, the likely cause and what to do.
    """
    try:
        yield
    except (HTTPError, OSError) as error:  # the first is not always one of the second
        response = getattr(error, "response", None)
        advice = "Is there a network, and does the Hub answer? Then push again."
        if response is not None:
            advice = _ADVICE.get(response.status_code, f"The Hub answered {response.status_code}; push again later.")
        says = f"(The library says: {' '.join(str(error).split())})"
        raise OSError(" ".join(filter(None, [f"Could not push to {repo_id}.", advice, kept, says]))) from error


def prepare_repository(repo_id: str, private: bool | None = None, token: str | bool | None = None) -> str:
    """Make a repository of models, unless there is one, and make sure that it may be written.

    `create_repo` alone is satisfied by a repository of somebody else.

    Parameters
    ----------
    repo_id
        Its id, or a name in the account of the token.
    private
        Make a new repository private; `None` takes the account's default.
    token
        Token for the Hub; the stored one if `None`.

    Returns
    -------
    The whole id.

    Raises
    ------
    OSError
        The repository cannot be written: [`explain_push`].
    """
    api = HfApi(token=token)
    with explain_push(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
    return repo_id


def upload_pipeline(
    folder: str,
    repo_id: str,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
    logging_dir: str = "logs",
) -> str:
    """Upload a pipeline folder, without the checkpoints and logs of its training; returns the commit's address."""
    return HfApi(token=token).upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        path_in_repo=subfolder,
        commit_message=commit_message,
        create_pr=create_pr,
        ignore_patterns=["checkpoint-*", "checkpoint-*/*", f"{logging_dir}/*"],
    )
