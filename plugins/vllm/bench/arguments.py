"""What the benches' command lines share."""


def numbers(text: str) -> list[int]:
    """Parses "1,8,32"."""
    return [int(n) for n in text.split(",")]
