"""Takes the place of a program that `server_forker.py` forks for it: same input and output, environment, folder and exit status.

`python -I -S tests/forked_program.py PROGRAM.py ARGUMENTS…`; the variable STAND_IN_FORKER names the forker's socket. The program runs as
on a Mac. Signals do not reach it, but it ends with this process.
"""

from __future__ import annotations

import json
import os
import socket
import sys


def main() -> int:
    """Have the program forked, wait for its end and return its exit status."""
    exit_status, theirs = os.pipe()
    # Without pathlib: its import would take a fifth of the time that a start costs.
    request = {"command": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd(), "mac": True}  # noqa: PTH109
    with socket.socket(socket.AF_UNIX) as forker:
        forker.connect(os.environ["STAND_IN_FORKER"])
        forker.recv(1)  # the greeting
        socket.send_fds(forker, [json.dumps(request).encode() + b"\n"], [0, 1, 2, theirs])
        os.close(theirs)
        forker.recv(20)  # the PID: what is left unread would reset the connection
        return int(os.read(exit_status, 10))


if __name__ == "__main__":
    sys.exit(main())
