"""The facts on which the order of images depends."""

from pathlib import Path

from sdxl_finetune.config import Dataset, Subset
from sdxl_finetune.data.batch_plan import build_plan
from sdxl_finetune.data.index import build_index
from sdxl_finetune.training.resume import data_order

FACT = "images in a batch of all processes"


def test_batch_sizes_are_told_apart_by_dataset(tmp_path: Path, write_images) -> None:
    def sizes(*batch_sizes: int) -> list[int]:
        datasets = [
            Dataset(
                resolution=(64, 64),
                batch_size=size,
                subsets=(Subset(image_dir=tmp_path / str(number), num_repeats=1, class_tokens=None),),
            )
            for number, size in enumerate(batch_sizes)
        ]
        index = build_index(datasets, tmp_path / "cache", "stop")
        found: list[int] = data_order(index, build_plan(index, ranks=2, accumulation=1, seed=1))[FACT]
        return found

    for number in range(3):
        write_images(tmp_path / str(number), {"a.png": (64, 64), "b.png": (64, 64)})
    assert sizes(2, 2, 2) == [4]
    assert sizes(1, 2, 2) == [2, 4, 4] and sizes(2, 1, 2) == [4, 2, 4]
