"""Commands, records and messages without the credentials that they were given."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
# What names of credentials end in; --num_cell_tokens, in the plural, is none.
_NAME = r"(?:token|secret|passw(?:or)?d|passphrase|credentials?|(?:api|access|secret|private|account)[_-]?key)"
# --hub_token and its abbreviations, which argparse accepts, and any other flag named like a credential.
_FLAG = rf"--?(?:[\w-]*{_NAME}|hub[_-]to?k?e?)"
_SECRET_NAME = re.compile(rf"(?:.*[\W_]|){_NAME}|\w*{_NAME}", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(rf"{_NAME}(?:_|$)", re.IGNORECASE)  # of the environment, such as HF_TOKEN_WRITE
_SECRET_FLAG = re.compile(_FLAG, re.IGNORECASE)
_PATTERNS = [
    re.compile(rf"({_FLAG}(?:=|\s+|['\"],\s*['\"]?))(?!-)[^\s'\"]+", re.IGNORECASE),
    re.compile(rf"((?:^|[^\w-])[\w-]*{_NAME}=)(?!\.\.\.|{re.escape(HIDDEN)})[^\s&;,'\"]+", re.IGNORECASE),
    re.compile(r"([?&;][\w.-]*(?:key|sig|signature|auth|jwt|pwd)=)[^\s&;'\"#]+", re.IGNORECASE),
    re.compile(rf"([\w-]*{_NAME}['\"]?\s*:\s*['\"]?)(?!None\b|null\b|{re.escape(HIDDEN)})[^\s'\",}}]+", re.IGNORECASE),
    # User and password of an address; Path drops a slash, and a password may hold one.
    re.compile(r"(\b[a-z][a-z0-9+.-]*:/{1,2})(?:[^/\s'\"]+|[^/:\s'\"]*:[^\s'\"]+)(?=@)", re.IGNORECASE),
    re.compile(r"(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:\w+\s+)?)[^\s'\"]+", re.IGNORECASE),
    re.compile(r"(\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE),
    re.compile(r"(\b)(?:hf_(?:oauth_|jwt_)?|api_org_|gh[oprsu]_)[A-Za-z0-9]{16,}"),
    re.compile(r"(\b)(?:github_pat_|glpat-)[\w-]{16,}"),
    re.compile(r"(\b)eyJ[\w-]{10,}(?:\.[\w-]+)+"),  # a JSON web token
]


def redact(value: Any) -> Any:
    """Replace the credentials in a text, or in all texts of a record, by three asterisks.

    Parameters
    ----------
    value
        A text, or dicts and lists of what JSON holds. A list of texts is taken for a command.

    Returns
    -------
    The same without tokens of the Hub, passwords in addresses, values of flags and variables that are named like
    credentials, and the values that such variables have in the environment.

    Examples
    --------
    >>> from scrdit_diffusers.redaction import redact
    >>> redact({"dataset": "https://ada:engine@example.org/cells.h5ad"})
    {'dataset': 'https://***@example.org/cells.h5ad'}
    >>> redact(["train.py", "--hub_token", "abc", "--seed", "1"])
    ['train.py', '--hub_token', '***', '--seed', '1']
    """
    if isinstance(value, str):
        return _redact_text(value)
    if isinstance(value, Mapping):
        return {key: HIDDEN if _is_secret(key, entry) else redact(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        hidden = _redact_command(value) if all(isinstance(word, str) for word in value) else map(redact, value)
        return type(value)(hidden)
    return value


def _is_secret(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, str) and bool(value and _SECRET_NAME.fullmatch(key))


def _redact_text(text: str) -> str:
    names = [name for name in os.environ if _SECRET_VARIABLE.search(name)]
    for secret in sorted((os.environ[name] for name in names), key=len, reverse=True):
        if len(secret) >= 8:  # shorter ones are found in words
            text = text.replace(secret, HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def _redact_command(words: Sequence[str]) -> list[str]:
    """Redact word by word: a credential may hold blanks."""
    hidden, follows = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if follows and word and not word.startswith("--"):
            hidden.append(HIDDEN)
        elif equals and (_SECRET_FLAG.fullmatch(name) or _SECRET_NAME.fullmatch(name)):
            hidden.append(f"{name}={HIDDEN}")
        else:
            hidden.append(_redact_text(word))
        follows = _SECRET_FLAG.fullmatch(word) is not None or (follows and not word)
    return hidden
