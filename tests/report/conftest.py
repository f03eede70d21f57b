"""The tests of the report use the latent cache of the tests of data."""

from tests.data.conftest import cache_latents  # noqa: F401  (pytest finds fixtures by name)
