"""What the benches' command lines share."""


def numbers(text: str) -> list[int]:
    """Parses "1,8,32"."""
    return [int(n) for n in text.split(",")]


def rates(text: str) -> list[float]:
    """Parses "0.5,2,inf"."""
    return [float(n) for n in text.split(",")]
