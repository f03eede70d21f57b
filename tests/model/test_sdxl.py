"""Predictions, losses and gradients are the reference's; chunks, token weights and half precision work."""

import copy

import pytest
import torch
from torch import Tensor

from sdxl_finetune.batch import Tokens
from sdxl_finetune.model.architecture import Architecture
from sdxl_finetune.model.attention import enable_gradient_checkpointing
from sdxl_finetune.model.load import Loaded
from sdxl_finetune.model.random_model import TINY, build_random_model
from sdxl_finetune.model.sdxl import SDXL

TOLERANCE = 1e-4


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm())


def sizes_of(golden) -> tuple[Tensor, Tensor, Tensor]:
    inputs = golden("forward.json")["inputs"]
    names = ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")
    first, second, third = (torch.tensor(inputs[name]) for name in names)
    return first, second, third


def predict(model: SDXL, golden, tensors: dict[str, Tensor]) -> Tensor:
    timesteps = torch.tensor(golden("forward.json")["inputs"]["timesteps"])
    return model(tensors["noisy_latents"], timesteps, Tokens(tensors["ids1"], tensors["ids2"]), *sizes_of(golden))


def min_snr_weights(timesteps: Tensor) -> Tensor:
    """Min-SNR weights with gamma 5 for noise prediction, by the formula."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)[timesteps]
    snr = kept / (1 - kept)
    return snr.clamp(max=5) / snr


def test_text_encoders_are_the_reference_s(golden_model: Loaded, golden_tensors: dict[str, Tensor]) -> None:
    hidden, pooled = golden_model.model.encode_text(Tokens(golden_tensors["ids1"], golden_tensors["ids2"]))
    width = golden_tensors["hidden_states1"].shape[-1]
    assert relative_error(hidden[..., :width], golden_tensors["hidden_states1"]) < TOLERANCE
    assert relative_error(hidden[..., width:], golden_tensors["hidden_states2"]) < TOLERANCE
    assert relative_error(pooled, golden_tensors["pool2"]) < TOLERANCE


def test_differs_from_reference_text_projection_is_transposed(
    golden_model: Loaded, golden_tensors: dict[str, Tensor]
) -> None:
    """Entry "Text encoder 2's projection" of docs/differences.md."""
    _, pooled = golden_model.model.encode_text(Tokens(golden_tensors["ids1"], golden_tensors["ids2"]))
    assert relative_error(pooled, golden_tensors["pool2_as_the_reference_computes_it"]) > 0.5


def test_size_embeddings_are_the_reference_s(golden, golden_model: Loaded, golden_tensors: dict[str, Tensor]) -> None:
    ids = torch.cat(sizes_of(golden), dim=1)
    embedded = golden_model.model.unet.add_time_proj(ids.flatten()).reshape(2, -1)
    assert relative_error(embedded, golden_tensors["size_embeddings"]) < TOLERANCE


def test_prediction_and_losses_are_the_reference_s(
    golden, golden_model: Loaded, golden_tensors: dict[str, Tensor]
) -> None:
    expected = golden("forward.json")["outputs"]
    with torch.no_grad():
        prediction = predict(golden_model.model, golden, golden_tensors)
    assert relative_error(prediction, golden_tensors["noise_pred"]) < TOLERANCE
    losses = (prediction - golden_tensors["noise"]).square().mean(dim=(1, 2, 3))
    assert losses.tolist() == pytest.approx(expected["loss_per_sample_eps"], rel=TOLERANCE)
    weighted = losses * min_snr_weights(torch.tensor(golden("forward.json")["inputs"]["timesteps"]))
    assert weighted.tolist() == pytest.approx(expected["min_snr5_weighted_eps"], rel=TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_norms_are_the_reference_s_and_every_parameter_is_used(
    golden, golden_model: Loaded, golden_tensors: dict[str, Tensor], checkpointing: bool
) -> None:
    model = copy.deepcopy(golden_model.model).train()
    if checkpointing:
        enable_gradient_checkpointing(model)
    losses = (predict(model, golden, golden_tensors) - golden_tensors["noise"]).square().mean(dim=(1, 2, 3))
    loss = (losses * min_snr_weights(torch.tensor(golden("forward.json")["inputs"]["timesteps"]))).mean()
    loss.backward()
    expected = golden("forward.json")["outputs"]
    assert float(loss.detach()) == pytest.approx(expected["loss"], rel=TOLERANCE)
    for part, norm in expected["grad_norm_of_loss"].items():
        gradients = [parameter.grad for parameter in getattr(model, part).parameters()]
        # DistributedDataParallel wants a gradient for each.
        assert all(gradient is not None for gradient in gradients)
        total = torch.stack([gradient.norm() for gradient in gradients]).norm()
        assert float(total) == pytest.approx(norm, rel=TOLERANCE)


@pytest.fixture(scope="module")
def tiny() -> SDXL:
    return build_random_model(TINY, seed=0)[0]


def tokens_of(k: int, chunks: int) -> Tensor:
    generator = torch.Generator().manual_seed(k)
    tokens = torch.randint(300, 40000, (k, chunks, 77), generator=generator)
    tokens[:, :, 0], tokens[:, :, 20:] = 49406, 49407
    return tokens


@pytest.mark.parametrize(("chunks", "length"), [(1, 77), (2, 152), (3, 227)])
def test_chunks_are_joined_to_one_sequence(tiny: SDXL, chunks: int, length: int) -> None:
    tokens = tokens_of(2, chunks)
    hidden, pooled = tiny.encode_text(Tokens(tokens, tokens))
    assert hidden.shape == (2, length, 192)
    alone = [tiny.encode_text(Tokens(tokens[:, c : c + 1], tokens[:, c : c + 1])) for c in range(chunks)]
    for c, (states, _) in enumerate(alone):
        torch.testing.assert_close(hidden[:, 1 + 75 * c : 76 + 75 * c], states[:, 1:-1])
    torch.testing.assert_close(hidden[:, 0], alone[0][0][:, 0])
    torch.testing.assert_close(hidden[:, -1], alone[-1][0][:, -1])
    torch.testing.assert_close(pooled, alone[0][1])


def test_token_weights_multiply_hidden_states_and_not_the_pooled_output(tiny: SDXL) -> None:
    tokens = tokens_of(2, 2)
    weights = torch.ones(2, 2, 77)
    weights[0, 1, 5] = 1.5
    plain, pooled = tiny.encode_text(Tokens(tokens, tokens))
    weighted, weighted_pooled = tiny.encode_text(Tokens(tokens, tokens, weights))
    expected = plain.clone()
    expected[0, 75 + 5] *= 1.5
    torch.testing.assert_close(weighted, expected)
    torch.testing.assert_close(weighted_pooled, pooled)


def test_pooled_output_is_that_of_the_first_end_of_text(tiny: SDXL) -> None:
    """Neither the padding nor a learned token with a higher id changes it."""
    tokens = tokens_of(1, 1)
    padded = tokens.clone()
    padded[:, :, 21:] = 0
    torch.testing.assert_close(tiny.encode_text(Tokens(tokens, tokens))[1], tiny.encode_text(Tokens(tokens, padded))[1])


def test_half_precision_distinguishes_neighbouring_timesteps_and_sizes(tiny: SDXL) -> None:
    """In bfloat16 1001 is 1000. Numbers are therefore embedded before they are cast."""
    model = copy.deepcopy(tiny).to(torch.bfloat16)
    tokens, latents = tokens_of(1, 1), torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    size, corner = torch.tensor([[1000, 1001]]), torch.zeros(1, 2, dtype=torch.int64)
    with torch.no_grad():
        first = model(latents, torch.tensor([500]), Tokens(tokens, tokens), size, corner, size)
        second = model(latents, torch.tensor([501]), Tokens(tokens, tokens), size, corner, size)
        third = model(latents, torch.tensor([500]), Tokens(tokens, tokens), size.flip(1), corner, size)
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)


def test_random_models_are_equal_for_equal_seeds_and_have_usual_scales() -> None:
    architecture: Architecture = TINY
    model, _ = build_random_model(architecture, seed=3)
    again, _ = build_random_model(architecture, seed=3)
    other, _ = build_random_model(architecture, seed=4)
    weight = "te1.encoder.layers.0.mlp.fc1.weight"
    names = dict(model.named_parameters())
    weight = weight if weight in names else weight.replace("te1.", "te1.text_model.")
    assert torch.equal(names[weight], dict(again.named_parameters())[weight])
    assert not torch.equal(names[weight], dict(other.named_parameters())[weight])
    tokens, size = tokens_of(2, 1), torch.full((2, 2), 256)
    with torch.no_grad():
        prediction = model(
            torch.randn(2, 4, 32, 32), torch.tensor([1, 999]), Tokens(tokens, tokens), size, size * 0, size
        )
    assert 0.05 < float(prediction.std()) < 5
