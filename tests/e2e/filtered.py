"""Runs a program that may make these system calls and no other, as a systemd unit would have it.

filtered.py CALL... -- PROGRAM ARGUMENT...
"""

import ctypes
import os
import sys

ALLOW, END_THE_PROCESS = 0x7FFF0000, 0x80000000

at = sys.argv.index("--")
calls, command = sys.argv[1:at], sys.argv[at + 1 :]
library = ctypes.CDLL("libseccomp.so.2")
library.seccomp_init.restype = ctypes.c_void_p
calls_of_this_process = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(END_THE_PROCESS)))
for call in calls:
    number = library.seccomp_syscall_resolve_name(call.encode())
    if number >= 0:  # otherwise one of another architecture, or newer than the library
        library.seccomp_rule_add(calls_of_this_process, ctypes.c_uint32(ALLOW), number, 0)
if library.seccomp_load(calls_of_this_process) != 0:
    sys.exit("filtered.py: the filter cannot be used")
os.execv(command[0], command)
