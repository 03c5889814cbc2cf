"""Make our own code believe that it runs on Apple Silicon, so that what it does there can be tested on any machine.

Only the answer of `config.system_and_processor` changes, which our modules ask. Python and its libraries behave as on this machine.
`pytest --mac` does this in the test process and in the programs that it starts: `python tests/as_mac.py PROGRAM.py ARGUMENTS…`.
"""

from __future__ import annotations

import runpy
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


def system_and_processor() -> tuple[str, str]:
    """Answer as a Mac with Apple Silicon does."""
    return "darwin", "arm64"


def pretend() -> None:
    """Pretend in this process, from now on."""
    import config

    config.system_and_processor = system_and_processor


def active() -> bool:
    """Return whether this process pretends to run on a Mac."""
    import config

    return config.system_and_processor is system_and_processor


def python() -> list[str]:
    """Return the command that runs one of our programs; as on a Mac, if this process pretends to run on one."""
    return [sys.executable, __file__] if active() else [sys.executable]


class _WhenImported:
    """Pretends when the program imports `config`: a program that never does has to stay as small as on a Mac."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Find `config` as usual, and change what it answers once it is loaded."""
        spec = PathFinder.find_spec(name) if name == "config" else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            module.system_and_processor = system_and_processor  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def main() -> None:
    """Run the program that the first argument names, with the modules of its own project."""
    sys.argv = sys.argv[1:]
    program = Path(sys.argv[0]).resolve()
    project = next(folder for folder in program.parents if (folder / "config.py").exists())
    sys.path[:1] = dict.fromkeys([str(program.parent), str(project)])
    sys.meta_path.insert(0, _WhenImported())
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main()
