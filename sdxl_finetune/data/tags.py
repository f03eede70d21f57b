"""Rules for single tags: which tags are protected, and which tags are dropped together with a tag.

Tags are compared without regard to case, to underscores against spaces, to backslashes and to brackets of weights:
`Hatsune_Miku_\\(Vocaloid\\)` equals `hatsune miku (vocaloid)`, and `(blue hair:1.2)` equals `blue hair`. In a rule `*`
matches any text, and `\\*` is a star.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_finetune.config.dataset import Subset
from sdxl_finetune.errors import Problem, Problems, UserError
from sdxl_finetune.parsing import parse_json, parse_toml_text
from sdxl_finetune.storage import Location, StorageError, read

BREAK = "BREAK"
"""Word at which a new chunk of tokens starts, with `caption_break`."""
WEIGHTED = re.compile(r"[(\[]+((?:[^()\[\]\\]|\\.)+?)(?::[+-]?[\d.]+)?[)\]]+")
"""A tag in brackets of weights. Brackets after a backslash belong to the tag."""
STAR = re.compile(r"(?<!\\)\*")
"""A star without a backslash before it."""
MOST_REMEMBERED = 1 << 16
"""Different tags whose comparison is remembered, about 10 MB. Datasets have a few thousand frequent tags."""


@functools.lru_cache(MOST_REMEMBERED)
def comparable(tag: str) -> str:
    """The form in which tags are compared."""
    tag = tag.strip()
    if weighted := WEIGHTED.fullmatch(tag):
        tag = weighted.group(1)
    return " ".join(tag.replace("\\", "").replace("_", " ").lower().split())


class Tags:
    """A set of tags and patterns. It remembers its answers, because the same tags come again and again."""

    def __init__(self, rules: Iterable[str], separator: str | None = None) -> None:
        """`separator` divides a tag into parts, of which one in the set is enough."""
        rules = [rule.strip() for rule in rules]
        self._separator = separator
        self._exact = frozenset(comparable(rule) for rule in rules if not STAR.search(rule))
        patterns = [".*".join(map(_escaped, STAR.split(rule))) for rule in rules if STAR.search(rule)]
        self._pattern = re.compile("|".join(patterns)) if patterns else None
        self.holds = functools.lru_cache(MOST_REMEMBERED)(self._holds)

    def _holds(self, tag: str) -> bool:
        """True if the tag or one of its parts is in the set."""
        return any(
            part in self._exact or (self._pattern is not None and self._pattern.fullmatch(part) is not None)
            for part in parts_of(tag, self._separator)
        )


def _escaped(part: str) -> str:
    """The regular expression of what stands between two stars of a rule. Spaces at its ends count."""
    return re.escape(re.sub(r"\s+", " ", part.replace("\\", "").replace("_", " ").lower()))


def parts_of(tag: str, separator: str | None) -> list[str]:
    """The parts of a tag in the form in which they are compared. Without a separator it has one part."""
    return [comparable(part) for part in (tag.split(separator) if separator else [tag])]


@dataclass(frozen=True)
class TagRules:
    """The tag rules of a subset."""

    protected: Tags
    groups: Sequence[tuple[Tags, Tags]]
    """Pairs: tags with patterns, and the tags that are dropped together with them."""
    followers: Mapping[str, tuple[str, ...]]
    """The tags that are dropped together with one tag, by that tag as it is compared. There may be many thousands."""
    separator: str | None
    """`secondary_separator`, which divides a tag into parts."""

    def dropped_with(self, dropped: Iterable[str], tags: Sequence[str]) -> set[str]:
        """Those of `tags` that are dropped together with a dropped tag, directly or through another such tag."""
        found: set[str] = set()
        waiting = list(dropped)
        while waiting:
            tag = waiting.pop()
            listed = [
                _tags(self.followers[part], self.separator)
                for part in parts_of(tag, self.separator)
                if part in self.followers
            ]
            listed += [others for owners, others in self.groups if owners.holds(tag)]
            new = {other for others in listed for other in tags if other not in found and others.holds(other)}
            found |= new
            waiting += new
        return found


_tags = functools.lru_cache(MOST_REMEMBERED)(Tags)
"""Returns equal Tags once, because a set of tags is compiled and remembers its answers."""


def tag_rules(options: Subset) -> TagRules | None:
    """The tag rules of a subset, or None if it has none. A process reads a file once.

    Raises UserError for a file that cannot be read.
    """
    if options.protected_tags_file is None and options.caption_tag_dropout_groups is None:
        return None
    return _load_rules(options.protected_tags_file, options.caption_tag_dropout_groups, options.secondary_separator)


def check_tag_rules(subsets: Iterable[Subset]) -> None:
    """Raises UserError with the problems of all files of tag rules."""
    problems = Problems()
    for subset in subsets:
        problems.attempt(tag_rules, subset)
    problems.raise_if_any()


@functools.cache
def _load_rules(protected: Location | None, groups: Location | str | None, separator: str | None) -> TagRules:
    lines = _read(protected, "protected_tags_file").split("\n") if protected else []
    rules = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    followers: dict[str, list[str]] = {}
    with_star: dict[str, list[str]] = {}
    for owner, listed in _read_groups(groups).items() if groups else ():
        kind, key = (with_star, owner) if STAR.search(owner) else (followers, comparable(owner))
        kind.setdefault(key, []).extend([listed] if isinstance(listed, str) else listed)
    return TagRules(
        Tags(rules, separator),
        [(Tags([owner], separator), Tags(listed, separator)) for owner, listed in with_star.items()],
        {owner: tuple(listed) for owner, listed in followers.items()},
        separator,
    )


def _read(path: Location, option: str) -> str:
    try:
        return read(path).decode("utf-8-sig")
    except StorageError as error:
        raise UserError(Problem(f"{error.reason}: check the path", option, str(path))) from None
    except UnicodeDecodeError:
        raise UserError(Problem("not a UTF-8 text file: save it as UTF-8", option, str(path))) from None


def _read_groups(groups: Location | str) -> Mapping[str, Any]:
    """Returns the tags that are dropped together with each tag. The schema has checked a table of the config."""
    if isinstance(groups, str):
        table: Mapping[str, Any] = parse_json(groups)
        return table
    option = "caption_tag_dropout_groups"
    text = _read(groups, option)
    try:
        content = parse_json(text) if groups.suffix.lower() == ".json" else parse_toml_text(text)
    except ValueError as error:
        message = f"neither valid TOML nor JSON ({error}): correct the file. Its name must end in .toml or .json"
        raise UserError(Problem(message, option, str(groups))) from None
    wrong = [tag for tag, listed in content.items() if not _is_listed(listed)] if isinstance(content, dict) else ["it"]
    if wrong:
        message = f'{wrong[0]!r} must have a list of tags, as "hatsune miku" = ["aqua hair", "twintails"]'
        raise UserError(Problem(message, option, str(groups)))
    return content


def _is_listed(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(tag, str) for tag in value))
