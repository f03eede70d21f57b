"""Checks of the options that become names of files. Findings are those of rules.py."""

from collections.abc import Iterator

from sdxl_finetune.config.options import Config

LONGEST_NAME = 200
"""Bytes. File systems take 255; step, ending and the words of a temporary name are added to the name."""


def name_problems(config: Config) -> Iterator[tuple[str, str]]:
    """Yields names that lead to another folder, or that no file system takes."""
    for option in ("output_name", "log_prefix", "log_tracker_name"):
        name = getattr(config, option) or ""
        if option == "output_name" and name and (set(name) & set("/\\") or not name.strip(". ")):
            yield option, "must be a file name without folders: set output_dir to the folder"
        if any(len(part.encode("utf-8", "surrogateescape")) > LONGEST_NAME for part in name.split("/")):
            yield option, f"is longer than {LONGEST_NAME} bytes, which is too long for the name of a file: shorten it"
