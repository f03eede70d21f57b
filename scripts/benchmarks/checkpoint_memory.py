"""Measures the peak private memory of loading, saving and merging full-size SDXL checkpoints.

    python -m scripts.benchmarks.checkpoint_memory [--folder /somewhere/with/room]

The script writes a float16 file of SDXL's size with random weights (6.9 GB), loads it in bfloat16 and saves it as
float16. For both phases it prints the highest RssAnon beside the size of the bfloat16 model. RssAnon is the memory of
the process that is not mapped from a file. It should be at most 20 % above the size of the model. Before that, the
script averages the file with itself by sdxl-model merge, which should take less than a gigabyte. The script needs 14 GB
of disk and 9 GB of memory, and takes a few minutes.
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

from sdxl_finetune.commands.model import main as model_tool
from sdxl_finetune.model.architecture import FULL, vae_config
from sdxl_finetune.model.keymap import LOGIT_SCALE
from sdxl_finetune.model.load import load_checkpoint
from sdxl_finetune.model.save import save_checkpoint, single_file_tensors
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.tensorfile import Source, write_safetensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder for the files (default: a temporary folder)")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        first, second = Path(folder, "first.safetensors"), Path(folder, "second.safetensors")
        write_safetensors(first, full_size_sources(), {})
        before = anonymous_bytes()
        with peak("merge in float16") as merging:
            model_tool(["merge", str(first), str(first), "--vae_weights", "1,1", "--output", str(second)])
        print(f"merge: peak {(merging[0] - before) / 1e9:.2f} GB over the process before")
        second.unlink()
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
            added = phase[0] - before
            print(f"{name}: peak {added / 1e9:.2f} GB over that, {100 * (added / model_bytes - 1):+.1f} % of the model")


def full_size_sources() -> dict[str, Source]:
    """Returns the tensors of a full-size checkpoint. Their random values are made when they are read."""
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
    """Returns the shape of a tensor in the last layer or norm of text encoder 1: that of encoder 2, at 1's width."""
    if name == LOGIT_SCALE:
        return ()
    te2_shape = next((tensor.shape for inner, tensor in layer.items() if name.endswith(inner)), (FULL.te2.width,))
    return tuple(side * FULL.te1.width // FULL.te2.width for side in te2_shape)


def anonymous_bytes() -> int:
    """Returns RssAnon of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@contextmanager
def peak(phase: str) -> Iterator[list[int]]:
    """Samples RssAnon every 5 ms within the context. The list holds the highest value, in bytes."""
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
        print(f"{phase}: {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
