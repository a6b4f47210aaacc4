"""The one exception of this package."""


class RelayError(RuntimeError):
    """Something that Relay cannot work with; the message says what to change."""
