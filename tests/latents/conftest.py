"""The tests of latents use the same generated images and datasets as the tests of data."""

from tests.data.conftest import cache_latents, dataset, subset  # noqa: F401  (pytest finds fixtures by name)
