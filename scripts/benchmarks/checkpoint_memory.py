"""Measures the peak private memory of loading and saving a full-size SDXL checkpoint.

    python -m scripts.benchmarks.checkpoint_memory [--folder /somewhere/with/room]

The script writes a float16 file of SDXL's size with random weights (6.9 GB), loads it in bfloat16, and saves it as
float16. For each phase it prints the highest RssAnon beside the size of the model in its training precision. RssAnon is
memory of the process alone that no file backs. The aim is at most 20 % above the model. It takes 14 GB of disk, 9 GB of
memory and a minute.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from sdxl_finetune.model.architecture import FULL, vae_config
from sdxl_finetune.model.keymap import LOGIT_SCALE
from sdxl_finetune.model.load import load_checkpoint
from sdxl_finetune.model.save import save_checkpoint, single_file_tensors
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.tensorfile import Source, write_safetensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to put the files (a temporary folder)")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        first, second = Path(folder, "first.safetensors"), Path(folder, "second.safetensors")
        write_safetensors(first, full_size_sources(), {})
        before = anonymous_bytes()
        with peak("load in bfloat16") as loading:
            loaded = load_checkpoint(first, dtype=torch.bfloat16)
        with peak("save in float16") as saving:
            save_checkpoint(
                second, loaded.model, loaded.vae, save_as="safetensors", dtype=torch.float16, metadata={"a": "b"}
            )
        tensors = [*loaded.model.parameters(), *loaded.vae.parameters(), *loaded.model.unused.values()]
        model_bytes = 2 * sum(tensor.numel() for tensor in tensors)
        print(f"the model in bfloat16: {model_bytes / 1e9:.2f} GB; the process before: {before / 1e9:.2f} GB")
        for name, phase in (("load", loading), ("save", saving)):
            own = phase[0] - before
            print(f"{name}: peak {own / 1e9:.2f} GB over that, {100 * (own / model_bytes - 1):+.1f} % of the model")


def full_size_sources() -> dict[str, Source]:
    """The tensors of a full-size checkpoint, drawn when they are read."""
    with torch.device("meta"):
        model, vae = SDXL(FULL), AutoencoderKL(**vae_config(FULL))
        layer = dict(model.te2.text_model.encoder.layers[0].named_parameters())
        model.unused = {name: torch.empty(te1_shape(name, layer)) for name in model.unused_names()}
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return block.repeat(-(-count // block.numel()))[:count].reshape(shape)

    sources = single_file_tensors(model, vae, torch.float16)
    return {
        key: Source(shape=source.shape, dtype=source.dtype, read=partial(draw, source.shape))
        for key, source in sources.items()
    }


def te1_shape(name: str, layer: dict[str, torch.Tensor]) -> tuple[int, ...]:
    """The shape of a tensor of te1's last layer or norm: as te2's, at te1's width."""
    if name == LOGIT_SCALE:
        return ()
    like = next((tensor.shape for inner, tensor in layer.items() if name.endswith(inner)), (FULL.te2.width,))
    return tuple(side * FULL.te1.width // FULL.te2.width for side in like)


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@contextmanager
def peak(what: str) -> Iterator[list[int]]:
    """Samples memory every 5 ms; the list gets the highest value."""
    highest, done, began = [anonymous_bytes()], threading.Event(), time.perf_counter()

    def sample() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield highest
    finally:
        done.set()
        thread.join()
        print(f"{what}: {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
