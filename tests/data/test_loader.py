"""Batches are functions of the position: the same on any rank and in any number of data-loader workers."""

import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sdxl_finetune.batch import Batch, Position, to_images
from sdxl_finetune.config import Config, NoiseOptions, PairingOptions
from sdxl_finetune.data.batch_plan import MicroBatch, Plan, build_plan
from sdxl_finetune.data.images import load_image, resize_and_crop
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.loader import LoadedBatch, TrainingDataset, load_batches
from sdxl_finetune.data.tokens import Tokenizer
from sdxl_finetune.data.workers import WorkersDied
from sdxl_finetune.diffusion.pairing import draw_paired_noise
from sdxl_finetune.diffusion.timesteps import draw_timesteps as draw_timesteps_of_options
from sdxl_finetune.errors import UserError
from sdxl_finetune.model.latent_scale import LatentScale
from sdxl_finetune.seeding import position_normal, position_rng
from tests.data.test_workers import spawned

SIZES = {"a.png": (64, 64), "b.jpg": (200, 180), "c.png": (70, 64), "d.webp": (64, 90), "e.png": (90, 70)}


def draw_noise(position: Position, shape: tuple[int, ...], latents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gives the latents as input noise, so that tests see which latents it was given."""
    slots = range(shape[0])
    rows = [position_normal(shape[1:], 1, "noise", position.step, position.micro_batch, slot) for slot in slots]
    noise = torch.tensor(np.stack(rows))
    return noise, 0 * noise if latents is None else latents


def draw_timesteps(position: Position, images: int, _pixels: int) -> Tensor:
    rngs = [position_rng(1, "timestep", position.step, position.micro_batch, slot) for slot in range(images)]
    return torch.tensor([int(rng.integers(1000)) for rng in rngs])


@pytest.fixture
def index(tmp_path: Path, subset, dataset, write_images) -> Index:
    for folder in ("1", "2"):
        write_images(tmp_path / folder, SIZES)
        for name in SIZES:
            (tmp_path / folder / name).with_suffix(".txt").write_text(f"{name}, cat, dog, bird, tree")
    options = {"caption_extension": ".txt", "shuffle_caption": True, "flip_aug": True}
    subsets = subset(tmp_path / "1", num_repeats=3, **options), subset(tmp_path / "2", random_crop=True, **options)
    datasets = [dataset(*subsets, bucket_reso_steps=64, min_bucket_reso=64)]
    return build_index(datasets, tmp_path / "cache", on_bad_image="stop")


def build(index: Index, **options: object) -> TrainingDataset:
    draws = {"draw_noise": draw_noise, "draw_timesteps": draw_timesteps}
    defaults = {"read_latents": None, "seed": 5, "max_steps": 100, **draws}
    return TrainingDataset(index=index, tokenize=Tokenizer(max_token_length=None), **{**defaults, **options})


def plan(index: Index, **options: int) -> Plan:
    return build_plan(index, **{"ranks": 1, "accumulation": 2, "seed": 5, **options})


def rows(batches: Iterable[Batch], name: str) -> Tensor:
    return torch.cat([getattr(batch, name) for batch in batches if batch.weights.any()])


def same(left: Batch, right: Batch) -> bool:
    pairs = [(getattr(left, field.name), getattr(right, field.name)) for field in fields(Batch)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_together_hold_the_micro_batch_of_a_single_rank(index: Index, ranks: int) -> None:
    """The weights of an optimizer step add up to the number of ranks."""
    micro_batches = list(plan(index).micro_batches(0, 6))
    totals: dict[int, float] = {}
    for micro_batch in micro_batches:
        alone = build(index)[micro_batch].batch
        parts = [build(index, rank=rank, ranks=ranks)[micro_batch].batch for rank in range(ranks)]
        for name in ("images", "noise", "encoding_noise", "timesteps", "tokens1", "tokens2", "original_size"):
            assert torch.equal(rows(parts, name), getattr(alone, name))
        assert torch.equal(rows(parts, "crop_top_left"), alone.crop_top_left)
        assert torch.allclose(rows(parts, "weights"), alone.weights * ranks)
        assert {part.timesteps_of_ranks for part in parts} == {tuple(alone.timesteps.tolist())}
        sizes = [int((part.weights > 0).sum()) for part in parts]
        assert sum(sizes) == len(micro_batch.rows) == alone.images_in_step and max(sizes) - min(sizes) <= 1
        assert all(len(part.weights) == max(size, 1) for part, size in zip(parts, sizes, strict=True))
        assert len({part.images.shape[1:] for part in parts}) == 1
        total = sum(float(part.weights.sum()) for part in parts)
        totals[micro_batch.position.step] = totals.get(micro_batch.position.step, 0.0) + total
    assert all(abs(total - ranks) < 1e-6 for total in totals.values())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_loss_weights_multiply_the_shares_of_images_on_every_rank(index: Index, tmp_path: Path, ranks: int) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[paths]\n"1/a*" = { loss_weight = 2.5 }\n"2/*" = { loss_weight = 0.25, repeats = 2 }\n')
    (data,) = index.datasets
    subsets = tuple(one.model_copy(update={"image_weights": rules}) for one in data.subsets)
    weighted = build_index([data.model_copy(update={"subsets": subsets})], tmp_path / "cache", on_bad_image="stop")
    assert weighted.repeats.tolist() == [3] * 5 + [2] * 5
    for micro_batch in plan(weighted).micro_batches(0, 4):
        k, parts = len(micro_batch.rows), micro_batch.position.micro_batches_in_step
        factor = [2.5 if row == 0 else 0.25 if row >= 5 else 1.0 for row in micro_batch.rows.tolist()]
        batches = [build(weighted, rank=rank, ranks=ranks)[micro_batch].batch for rank in range(ranks)]
        assert torch.allclose(rows(batches, "weights"), torch.tensor(factor) * ranks / (k * parts))


def test_crop_top_left_is_where_the_image_was_cropped(index: Index) -> None:
    """The batch's image is the crop at crop_top_left of the resized image, mirrored before the crop if at all."""
    seen = set()
    for micro_batch in plan(index).micro_batches(0, 12):
        batch = build(index)[micro_batch].batch
        for slot, row in enumerate(micro_batch.rows.tolist()):
            entry = index[row]
            bucket = (entry.bucket.width, entry.bucket.height)
            whole = resize_and_crop(load_image(entry.path, entry.resized), entry.resized, (0, 0), entry.resized)
            top, left = batch.crop_top_left[slot].tolist()
            both = (whole, whole[:, ::-1])
            views = [picture[top : top + bucket[1], left : left + bucket[0]] for picture in both]
            image = ((batch.images[slot].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
            matches = [np.array_equal(image, view) for view in views]
            assert any(matches)
            seen.add((entry.path.parent.name, entry.path.name, matches[0], left, top))
            assert batch.original_size[slot].tolist() == [entry.size[1], entry.size[0]]
            assert batch.target_size[slot].tolist() == [bucket[1], bucket[0]]
    assert {straight for _, _, straight, _, _ in seen} == {True, False}
    centred = {(left, top) for folder, name, _, left, top in seen if (folder, name) == ("1", "c.png")}
    anywhere = {(left, top) for folder, name, _, left, top in seen if (folder, name) == ("2", "e.png")}
    assert centred == {(3, 0)} and len(anywhere) > 1


def test_captions_and_noise_repeat_at_a_position_and_differ_at_another(index: Index) -> None:
    micro_batch = next(plan(index).micro_batches(0, 1))
    later = MicroBatch(Position(epoch=1, step=7, micro_batch=0, micro_batches_in_step=2), micro_batch.rows)
    first, again, other = (build(index)[each].batch for each in (micro_batch, micro_batch, later))
    assert same(first, again)
    assert not torch.equal(first.tokens1, other.tokens1) and not torch.equal(first.noise, other.noise)
    assert not same(first, build(index, seed=6)[micro_batch].batch)


def test_color_aug_changes_the_images_of_a_batch(index: Index, subset, dataset, tmp_path: Path) -> None:
    built = dataset(subset(tmp_path / "1", color_aug=True), bucket_reso_steps=64, min_bucket_reso=64)
    colored = build_index([built], tmp_path / "cache", on_bad_image="stop")
    changed = 0
    for step in range(20):
        micro_batch = MicroBatch(
            Position(epoch=0, step=step, micro_batch=0, micro_batches_in_step=1), np.zeros(1, np.int32)
        )
        image = build(colored)[micro_batch].batch.images
        pixels = torch.from_numpy(colored[0].load((0, 0)).copy()).permute(2, 0, 1)
        changed += not torch.allclose(image[0], pixels / 127.5 - 1, atol=1e-6)
    assert 1 <= changed <= 14


def encode(pixels: Tensor, noise: Tensor):
    means = torch.nn.functional.avg_pool2d(to_images(pixels), 8)
    latents = (torch.cat([means, means.mean(1, keepdim=True)], 1) + 0.1 * noise).half()
    return lambda: latents


@pytest.fixture
def cached(index: Index, cache_latents) -> TrainingDataset:
    scale = LatentScale(scale=(0.5,))
    return build(index, read_latents=cache_latents(index, encode)[0].read, scale_latents=scale.scaled)


def test_batches_hold_cached_latents_mirrored_or_not(index: Index, cached: TrainingDataset) -> None:
    mirrored = 0
    for micro_batch in plan(index).micro_batches(0, 6):
        batch = cached[micro_batch].batch
        assert batch.images is None and batch.latents.dtype == torch.float32
        assert torch.equal(batch.input_noise, 0.5 * batch.latents), "draw_noise was given the scaled latents"
        for slot, row in enumerate(micro_batch.rows.tolist()):
            stored = [cached.read_latents([row], [flip])[0] for flip in (False, True)]
            match = [np.array_equal(batch.latents[slot].numpy(), latent) for latent in stored]
            assert sum(match) == 1
            mirrored += match[1]
        shared = [
            build(index, read_latents=cached.read_latents, rank=rank, ranks=2)[micro_batch].batch for rank in (0, 1)
        ]
        assert torch.equal(rows(shared, "latents"), batch.latents)
    assert mirrored > 0


@pytest.mark.parametrize("pairing", [{"flow_use_ot": True}, {"immiscible_noise": 4}, {"knn_noise_k": 3}], ids=str)
def test_ranks_pair_noise_as_a_single_rank_does(index: Index, cached: TrainingDataset, pairing: dict) -> None:
    """Noise, input noise and negatives. A new dataset gives the same batch again, as in a resumed run."""
    options = NoiseOptions(noise_offset=0.1, ip_noise_gamma=0.1, adaptive_noise_scale=0.5)
    draw = partial(draw_paired_noise, options, PairingOptions(**pairing), 5)
    names = ("latents", "noise", "input_noise", "negative_latents", "negative_noise")
    settings = {"draw_noise": draw, "read_latents": cached.read_latents, "contrastive": True}
    settings["scale_latents"] = cached.scale_latents
    changed = compared = 0
    for micro_batch in plan(index).micro_batches(0, 6):
        alone = build(index, **settings)[micro_batch].batch
        assert same(alone, build(index, **settings)[micro_batch].batch)
        scaled = cached.scale_latents(alone.latents)
        if len(micro_batch.rows) == 1:
            assert alone.negative_latents is None and alone.negative_noise is None
            continue
        assert torch.equal(alone.negative_latents, scaled.roll(1, 0))
        assert torch.equal(alone.negative_noise, alone.noise.roll(1, 0))
        for ranks in (2, 3):
            parts = [build(index, rank=rank, ranks=ranks, **settings)[micro_batch].batch for rank in range(ranks)]
            assert all(torch.equal(rows(parts, name), getattr(alone, name)) for name in names)
        shape = tuple(alone.noise.shape)
        plain = draw_paired_noise(options, PairingOptions(), 5, micro_batch.position, shape, scaled)[0]
        changed, compared = changed + int((plain != alone.noise).any()), compared + 1
    assert compared >= 3 and changed > 0, "pairing has changed some batches"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_latent_ends_the_run_with_a_one_line_message(
    index: Index, cache_latents, tmp_path: Path, workers: int
) -> None:
    store, _, shards = cache_latents(index, encode, folder=tmp_path / "disk")
    for shard in shards:
        with shard.path.open("r+b") as file:
            file.seek(shard.start)
            file.write(bytes(200))
    settings = {"workers": workers, "pin_memory": False, "on_bad_image": "skip"}
    with pytest.raises(UserError, match=r"^[^\n]*the latent of .* is damaged[^\n]*start the run again[^\n]*$"):
        list(load_batches(build(index, read_latents=store.read), plan(index).micro_batches(0, 20), **settings))


@pytest.fixture
def loaded(index: Index) -> Callable[..., list[Batch]]:
    def load(data: TrainingDataset, steps: int, **options: object) -> list[Batch]:
        defaults = {"workers": 0, "pin_memory": False, "on_bad_image": "stop"}
        return list(load_batches(data, plan(index).micro_batches(0, steps), **{**defaults, **options}))

    return load


def test_workers_give_the_same_batches_in_order(index: Index, cached: TrainingDataset, loaded) -> None:
    """Over two epochs, with latents from shared memory. Workers ignore SIGTERM and SIGINT."""
    steps = 2 * plan(index).steps_per_epoch
    before = torch.random.get_rng_state()
    expected = loaded(cached, steps)
    batches = load_batches(
        cached, plan(index).micro_batches(0, steps), workers=2, pin_memory=False, on_bad_image="stop"
    )
    loaded_batches = [next(batches)]
    workers = spawned()
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    loaded_batches += list(batches)
    assert len(workers) >= 2 and len(loaded_batches) == len(expected)
    assert all(same(left, right) for left, right in zip(loaded_batches, expected, strict=True))
    assert {batch.position.epoch for batch in loaded_batches} == {0, 1}
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator of the main process is unchanged"


@dataclass(frozen=True, kw_only=True)
class Deadly(TrainingDataset):
    """A worker that makes the batch of step 3 dies, once for each byte that it finds in `lives`."""

    lives: Path

    def __getitem__(self, micro_batch: MicroBatch) -> LoadedBatch:
        if micro_batch.position.step == 3 and (left := self.lives.read_bytes()):
            self.lives.write_bytes(left[1:])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(micro_batch)


@pytest.mark.parametrize("deaths", [2, 4])
def test_a_killed_worker_is_replaced_until_a_batch_kills_each(
    index: Index, cached: TrainingDataset, loaded, tmp_path: Path, caplog, deaths: int
) -> None:
    """The batches are those of a run without a death. SIGCHLD raises no error in the main process.

    The first of four deaths may come before an earlier batch has left the worker, and is then counted for that one.
    """
    (tmp_path / "lives").write_bytes(b"x" * deaths)
    values = {field.name: getattr(cached, field.name) for field in fields(cached)}
    dataset = Deadly(**values, lives=tmp_path / "lives")
    handler = signal.getsignal(signal.SIGCHLD)
    if deaths == 2:
        for one, other in zip(loaded(dataset, 8, workers=1), loaded(cached, 8), strict=True):
            assert same(one, other)
        assert caplog.text.count("was killed by SIGKILL; workers are started again") == deaths
    else:
        with pytest.raises(WorkersDied) as caught:
            loaded(dataset, 8, workers=1)
        micro_batch = next(plan(index).micro_batches(3, 4))
        said = str(caught.value)
        assert "killed by SIGKILL, 3 times in a row, while it made the batch of step 4" in said
        assert str(index[int(micro_batch.rows[0])].path) in said and "max_data_loader_n_workers" in said
    assert not spawned() and signal.getsignal(signal.SIGCHLD) is handler


def test_an_unreadable_image_stops_the_run(index: Index, loaded) -> None:
    """The worker's problem arrives as one line without a traceback."""
    broken = index[3].path
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UserError) as caught:
        loaded(build(index), 20, workers=1)
    (problem,) = caught.value.problems
    assert problem.file == str(broken) and "\n" not in str(problem) and "Traceback" not in str(problem)


def test_an_unreadable_image_is_skipped_at_weight_zero(index: Index, loaded, caplog) -> None:
    broken = index[3].path
    broken.write_bytes(broken.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        batches = loaded(build(index), 2 * plan(index).steps_per_epoch, on_bad_image="skip")
    assert [str(broken) in record.message for record in caplog.records] == [True]
    zero = sum(int((batch.weights == 0).sum()) for batch in batches)
    assert zero == 2 * index.repeats[3]
    assert all(torch.isfinite(batch.images).all() for batch in batches)


ABANDON = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.data import test_loader
from sdxl_finetune.data.index import build_index
from sdxl_finetune.config import Dataset, Subset
if __name__ == "__main__":
    folder = Subset(image_dir=Path(sys.argv[2]), num_repeats=9, class_tokens=None)
    data = Dataset(resolution=(64, 64), batch_size=1, subsets=(folder,))
    index = build_index([data], Path(sys.argv[3]), on_bad_image="stop")
    batches = test_loader.load_batches(
        test_loader.build(index), test_loader.plan(index).micro_batches(0, 50),
        workers=1, pin_memory=False, on_bad_image="stop",
    )
    next(batches)
    raise SystemExit(7)
"""


def test_a_process_with_an_open_loader_exits_promptly(tmp_path: Path, write_images) -> None:
    """Workers ignore SIGTERM, so the exiting process has to end them in another way."""
    write_images(tmp_path / "a", {f"{number}.png": (64, 64) for number in range(5)})
    (tmp_path / "abandon.py").write_text(ABANDON)
    arguments = [tmp_path / "abandon.py", Path(__file__).parents[2], tmp_path / "a", tmp_path / "cache"]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 7, done.stderr


@dataclass(frozen=True, kw_only=True)
class LargeBatches(TrainingDataset):
    """Batches whose transfer to the main process takes longer than the workers' exit."""

    def __getitem__(self, micro_batch: MicroBatch) -> LoadedBatch:
        loaded = super().__getitem__(micro_batch)
        return replace(loaded, batch=replace(loaded.batch, noise=torch.ones(8, 1, 1000, 1000)))


def test_workers_that_are_ended_while_they_send_do_not_abort(cached: TrainingDataset, index: Index) -> None:
    """Without care some three in ten workers abort, and the run ends with an error of torch."""
    dataset = LargeBatches(**{field.name: getattr(cached, field.name) for field in fields(cached)})
    steps = plan(index).micro_batches(0, 100)
    batches = load_batches(dataset, steps, workers=2, pin_memory=False, on_bad_image="stop")
    next(batches)
    batches.close()


def test_ranks_share_stratified_timesteps_as_one_rank_has_them(index: Index) -> None:
    """The pixels of a bucket reach the shift by resolution."""
    options = {"flow_model": True, "stratified_timesteps": True, "flow_uniform_shift": True}
    config = Config(**options, flow_timestep_distribution="uniform", flow_uniform_base_pixels=32 * 64)
    draws = {"draw_timesteps": partial(draw_timesteps_of_options, config, 5)}
    sizes = set()
    for micro_batch in plan(index, ranks=2).micro_batches(0, 4):
        alone = build(index, **draws)[micro_batch].batch
        parts = [build(index, **draws, rank=rank, ranks=2)[micro_batch].batch for rank in range(2)]
        assert torch.equal(rows(parts, "timesteps"), alone.timesteps)
        t, count = alone.timesteps / 1000, len(alone.timesteps)
        ratio = math.sqrt(alone.target_size[0].prod() / (32 * 64))
        unshifted = t / (ratio - (ratio - 1) * t)
        assert sorted((unshifted * count).ceil().tolist()) == list(range(1, count + 1))
        sizes.add(ratio)
    assert sizes == {math.sqrt(2)}
