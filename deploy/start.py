"""Start the server as a service. A start that no restart can mend ends for good, in one line of the log."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

PROJECT_DIR = Path(__file__).resolve().parent.parent

_MAX_LOG_BYTES = 1 << 20  # of launchd.log, which nobody else limits


def main() -> int:
    """Run the server, which ends the process; return the exit status of an invalid setting if its modules cannot be imported."""
    _limit_log()
    sys.path.insert(0, str(PROJECT_DIR))
    try:
        from server import run
    except Exception as error:  # a package that is broken, or removed, may raise anything
        reason = next(iter(str(error).strip().splitlines()), "")
        print(
            f"sesame-tts: the server cannot be imported ({type(error).__name__}: {reason}). Run {PROJECT_DIR}/install.sh to repair the packages.",
            file=sys.stderr,
        )
        return int(os.environ.get("SETTING_ERROR_STATUS", "2"))
    return run()


def _limit_log() -> None:
    """Empty the file that stderr goes to, if it has become too large: a server that crashes at each start writes to it every ten seconds."""
    shown = os.fstat(2)
    if stat.S_ISREG(shown.st_mode) and shown.st_size > _MAX_LOG_BYTES:
        os.ftruncate(2, 0)


if __name__ == "__main__":
    sys.exit(main())
