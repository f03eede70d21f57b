"""Numbers as readers of a page see them."""


def percent(share: float) -> str:
    """A share as text, such as `12 %`, `0.4 %` or `under 0.1 %`."""
    if 0 < share < 0.001:
        return "under 0.1 %"
    if 0.999 < share < 1:
        return "over 99.9 %"
    return f"{share * 100:.0f} %" if share in (0, 1) or share >= 0.0995 else f"{share * 100:.1f} %"


def number(count: int, one: str, several: str | None = None) -> str:
    """A number with its noun, such as `1 image` or `5,000 images`."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"
