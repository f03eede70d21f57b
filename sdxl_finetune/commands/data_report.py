"""`sdxl-data report`: writes one HTML page about a dataset (report/)."""

from pathlib import Path

from sdxl_finetune.config import Config
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.output.console import console
from sdxl_finetune.report.collect import collect
from sdxl_finetune.report.page import check_libraries, write_page


def data_report(config: Config, output: Path, *, rare: int) -> int:
    """Writes the page; returns the exit status. Raises UserError for the user's mistakes."""
    check_libraries()
    if rare < 0:
        raise UserError(Problem("give a number of images, 0 or more", key="--rare", value=rare))
    if output.is_dir():
        raise UserError(
            Problem("this is a folder: name a file, such as report.html", key="--output", value=str(output))
        )
    with console(config, 0):
        report = collect(config, rare)
        try:
            write_page(report, output)
        except OSError as error:
            message = f"the page cannot be written ({error.strerror}): choose another place"
            raise UserError(Problem(message, key="--output", value=str(output))) from error
    print(f"wrote {output}: {len(report.index):,} images, {output.stat().st_size / 1e6:.1f} MB")
    return 0
