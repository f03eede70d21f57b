"""Options of the Hugging Face hub: what a place on the hub looks like, and the checks over several options."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdxl_finetune.config.options import Config

REPO_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]{0,94}(?<![.-])(?<!\.git)", re.ASCII)
"""Names that the hub allows: `user/name`."""
REPO_TYPES = ("model", "dataset", "space")
AUTO = Path("auto")
"""Value of `resume` for the newest save of the run."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A file or folder in a repository of the hub."""

    repo_id: str
    repo_type: str
    path: str
    """Path in the repository; empty for its root."""
    revision: str | None
    """Branch, tag or commit. None for the main branch."""


def parse_place(text: str) -> Place:
    """Returns the place of a text `user/name/path:revision:type`, as the reference reads it.

    Revision and type may be left out. Raises ValueError with what is wrong.
    """
    location, revision, repo_type = [*text.split(":"), "", ""][:3]
    user, name, path = [*location.split("/", 2), "", ""][:3]
    if text.count(":") > 2 or not REPO_ID.fullmatch(f"{user}/{name}"):
        raise ValueError("must be user/name/path of a folder on the hub, and may end in :revision:type")
    if repo_type and repo_type not in REPO_TYPES:
        raise ValueError(f"the type must be one of {', '.join(REPO_TYPES)}, not {repo_type}")
    return Place(
        repo_id=f"{user}/{name}", repo_type=repo_type or "model", path=path.strip("/"), revision=revision or None
    )


def hub_problems(config: Config) -> Iterator[tuple[str, str]]:
    """Yields the mistakes in the options of the hub that can be seen without a network."""
    if config.huggingface_repo_id and not REPO_ID.fullmatch(config.huggingface_repo_id):
        yield "huggingface_repo_id", 'must be the name of a repository on the hub, as "user/name"'
    if config.huggingface_repo_type and config.huggingface_repo_type not in REPO_TYPES:
        yield "huggingface_repo_type", f"must be one of {', '.join(REPO_TYPES)}"
    if set((config.huggingface_path_in_repo or "").split("/")) & {".", "..", ".git"}:
        yield "huggingface_path_in_repo", "must be the path of a folder in the repository, without . and .."
    if config.resume_from_huggingface and config.resume and config.resume != AUTO:
        try:
            parse_place(config.resume.as_posix())
        except ValueError as error:
            yield "resume resume_from_huggingface", f"{error} (resume_from_huggingface is set)"


def hub_remarks(config: Config) -> Iterator[tuple[str, str]]:
    """Yields what is allowed but may surprise the user, besides options without effect, which the schema tells."""
    if config.resume_from_huggingface and config.resume == AUTO:
        yield "resume_from_huggingface", "has no effect with resume = auto, which looks in output_dir only"
    if config.async_upload and not config.huggingface_repo_id:
        yield "async_upload", "has no effect without huggingface_repo_id"
    if not config.huggingface_repo_id:
        return
    if config.save_state_to_huggingface and not (config.save_state or config.save_state_on_train_end):
        yield "save_state_to_huggingface", "uploads only the state of a stopped run: set save_state to save others"
    if config.huggingface_repo_visibility not in (None, "public", "private"):
        yield "huggingface_repo_visibility", "is read as private, as in the reference"
