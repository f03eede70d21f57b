"""Hides tokens, keys and passwords in text that is shown or saved.

A secret is known by the option or environment variable that holds it, or by its form. Libraries put addresses, requests
and headers into their messages. Therefore text is searched when it leaves the program, wherever it comes from.
"""

import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from sdxl_finetune.printable import PrintableMessages

HIDDEN = "***"
FORMS = re.compile(
    r"(?P<before>://)[^/\s'\"]+(?=@)"  # user name and password in an address
    r"|(?P<address>https?://[^\s'\"?]*\?)[^\s'\"]+"  # the query of an address, which may be a signature
    r"|\bhf_[A-Za-z0-9]{20,}\b"  # a token of the Hugging Face hub
    r"|(?P<header>\bBearer )[\w.~+/=-]{8,}"
)
"""Secrets that are known by their form."""
VARIABLES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_TOKEN", "AZURE_CLIENT_SECRET"),
    *("GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_API_KEY"),
)
"""Environment variables that hold secrets of the libraries in use."""
SHORTEST = 6
"""Letters: a shorter text is not hidden, because it would also be hidden within ordinary words."""
NAME = re.compile(r"(?i)((?<!keep_)token|passw(or)?d|secret|api_?key|access_?key|credential)\w?$")
"""Names of options that hold secrets, in this program and in others, with at most one letter more.

The option `keep_tokens` counts tags.
"""


def known_secrets(given: Iterable[str | None] = ()) -> tuple[str, ...]:
    """The secrets among these values and in the environment, the longest first."""
    values = {*given, *map(os.environ.get, VARIABLES)}
    return tuple(
        sorted((value for value in values if value and len(value) >= SHORTEST), key=lambda text: (-len(text), text))
    )


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """The text with *** in the place of these secrets and of all that are known by their form."""
    return FORMS.sub(_shown_part, replaced(text, secrets))


def replaced(value: Any, secrets: Iterable[str]) -> Any:
    """A value of JSON or TOML with *** in the place of these secrets, which may stand in any text of it."""
    match value:
        case str():
            for secret in secrets:
                value = value.replace(secret, HIDDEN)
            return value
        case list():
            return [replaced(one, secrets) for one in value]
        case dict():
            return {key: replaced(one, secrets) for key, one in value.items()}
    return value


def _shown_part(found: "re.Match[str]") -> str:
    return "".join(part for part in found.group("before", "address", "header") if part) + HIDDEN


def is_secret_name(name: str) -> bool:
    """True if an option of this name may hold a secret, also one that this program does not have."""
    return bool(NAME.search(name))


class _Redacting(PrintableMessages):
    """A text stream that shows *** in the place of secrets, and no control characters."""

    def __init__(self, stream: Any, secrets: tuple[str, ...]) -> None:
        super().__init__(stream)
        self._secrets = secrets

    def write(self, text: str) -> int:
        super().write(redacted(text, self._secrets))
        return len(text)


def hide_in_output(secrets: Iterable[str | None] = ()) -> tuple[str, ...]:
    """Hides these secrets and those of the environment in what stderr shows, and returns them.

    Secrets that are known by their form are hidden too. Tracebacks, and warnings of libraries, go to stderr. The
    program calls this at its start, and again when it knows the secrets of the config.
    """
    known = known_secrets(secrets)
    stream = sys.stderr.stream if isinstance(sys.stderr, _Redacting) else sys.stderr
    sys.stderr = _Redacting(stream, known)
    return known
