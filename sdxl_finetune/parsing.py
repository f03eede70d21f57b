"""Parses JSON and TOML that others wrote. Every text that cannot be parsed raises ValueError.

The parsers of the standard library raise RecursionError for a text that is nested some thousand levels deep. Such a
text may stand in a caption file, in the metadata of a checkpoint, or in any other file that a program is given.
"""

import json
import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOO_DEEP = "it is nested too deeply"


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def parse_toml_text(text: str) -> dict[str, Any]:
    """The content of a TOML text. Raises ValueError, and for wrong syntax its subclass `tomllib.TOMLDecodeError`."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
