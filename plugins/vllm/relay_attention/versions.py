"""Which versions of vLLM are known, and the one place for what differs between them.

0.32 and 0.33 give both backends the same interfaces, so nothing differs so far.
"""

KNOWN = ("0.32", "0.33")


def obstacle(version: str) -> str | None:
    """Why vLLM `version`, e.g. "0.33.0", is not served; None if it is."""
    if ".".join(version.split(".")[:2]) in KNOWN:
        return None
    return f"vLLM {version} is not known to it; known are {' and '.join(KNOWN)}"
