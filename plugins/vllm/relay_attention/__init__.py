"""Relay's attention inside vLLM: a prompt that requests share is read once per batch.

Nothing is to be called: vLLM finds the package by its entry point and computes its CPU attention
through it. `python -m relay_attention.doctor` says whether it will.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("relay-attention")
except PackageNotFoundError:  # imported from a source folder
    __version__ = "0+source"
