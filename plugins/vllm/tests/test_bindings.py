"""The ctypes structs have the sizes and offsets that a C compiler gives those of the headers."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from relay_attention.cpu import native as cpu
from relay_attention.cuda import native as cuda

PLUGIN = Path(__file__).parents[1]
STRUCTS = {
    "relay/relay.h": {
        "relay_batch": cpu.Batch,
        "relay_plan_options": cpu.PlanOptions,
        "relay_kv": cpu.Kv,
        "relay_inputs": cpu.Inputs,
        "relay_kv_write": cpu.KvWrite,
    },
    "openmp.h": {"relay_openmp": cpu.OpenMp},
    "relay/relay_cuda.h": {
        "relay_cuda_plan_options": cuda.PlanOptions,
        "relay_cuda_batch": cuda.Batch,
        "relay_cuda_inputs": cuda.Inputs,
        "relay_cuda_summary": cuda.Summary,
    },
}


@pytest.mark.parametrize("header", STRUCTS)
def test_layout(header, tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "a C compiler is needed"
    structs = STRUCTS[header]
    lines = [
        f'printf("{name} {field} %zu\\n", offsetof({name}, {field}));'
        for name, struct in structs.items()
        for field, *_ in struct._fields_
    ] + [f'printf("{name} sizeof %zu\\n", sizeof({name}));' for name in structs]
    program = tmp_path / "layout.c"
    program.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{header}"\n'
        "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    )
    includes = [f"-I{PLUGIN.parents[1] / 'include'}", f"-I{PLUGIN / 'native'}"]
    subprocess.run([compiler, *includes, str(program), "-o", str(tmp_path / "layout")], check=True)
    output = subprocess.run(
        [str(tmp_path / "layout")], check=True, capture_output=True, text=True
    ).stdout
    theirs = {tuple(line.split()[:2]): int(line.split()[2]) for line in output.splitlines()}
    ours = {
        (name, field): getattr(struct, field).offset
        for name, struct in structs.items()
        for field, *_ in struct._fields_
    } | {(name, "sizeof"): ctypes.sizeof(struct) for name, struct in structs.items()}
    assert ours == theirs


def test_constants():
    header = (PLUGIN.parents[1] / "include/relay/relay_cuda.h").read_text()
    assert f"#define RELAY_CUDA_F8_E4M3 {cuda.F8_E4M3}" in header
    assert (
        "RELAY_F32 = 0, RELAY_F16 = 1, RELAY_BF16 = 2"
        in (PLUGIN.parents[1] / "include/relay/relay.h").read_text()
    )
    assert (cpu.F32, cuda.F16, cuda.BF16) == (0, 1, 2)
