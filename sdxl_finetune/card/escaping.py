"""Foreign text in Markdown. Titles, names and notes that stand in the file of a model are shown letter for letter."""

import re

from sdxl_finetune.printable import printable

MARKUP = re.compile(r"[\\`*\[\]<>&|~$#]|(?<![^\W_])_|_(?![^\W_])")
"""Letters of markup anywhere in a line. An underscore within a word is none."""
LIST = re.compile(r"^(?P<number>[0-9]+(?=[.)](?:\s|$))|(?=[-+=]))(?P<mark>[-+=.)])")
"""Letters of markup at the start of a line: of a list, or of the line below a heading."""


def escape(text: str) -> str:
    """Text from a foreign file, in which no letter is markup. It becomes one line."""
    line = MARKUP.sub(r"\\\g<0>", printable(" ".join(text.split())))
    return LIST.sub(r"\g<number>\\\g<mark>", line)
