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
_SECRET_FLAG = re.compile(_FLAG, re.IGNORECASE)
_PATTERNS = [
    re.compile(rf"({_FLAG}(?:=|\s+|['\"],\s*['\"]?))(?!-)[^\s'\"]+", re.IGNORECASE),
    re.compile(rf"((?:^|[^\w-])[\w-]*{_NAME}=)(?!\.\.\.|{re.escape(HIDDEN)})[^\s&;,'\"]+", re.IGNORECASE),
    re.compile(r"([?&;][\w.-]*(?:key|sig|signature|auth)=)[^\s&;'\"#]+", re.IGNORECASE),
    re.compile(r"(\b[a-z][a-z0-9+.-]*:/{1,2})[^/\s'\"]+(?=@)", re.IGNORECASE),  # user and password; Path drops a slash
    re.compile(r"(\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE),
    re.compile(r"(\b)(?:hf|api_org|gh[opsu]|github_pat|glpat)[_-][A-Za-z0-9]{16,}"),
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
        return {key: redact(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        hidden = _redact_command(value) if all(isinstance(word, str) for word in value) else map(redact, value)
        return type(value)(hidden)
    return value


def _redact_text(text: str) -> str:
    names = [name for name in os.environ if _SECRET_NAME.fullmatch(name)]
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
        if follows and not word.startswith("--"):
            hidden.append(HIDDEN)
        elif equals and (_SECRET_FLAG.fullmatch(name) or _SECRET_NAME.fullmatch(name)):
            hidden.append(f"{name}={HIDDEN}")
        else:
            hidden.append(_redact_text(word))
        follows = _SECRET_FLAG.fullmatch(word) is not None
    return hidden
