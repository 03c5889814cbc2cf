"""What a person at a terminal sees while a text is spoken: what is waited for, and a bar with sentences, seconds of sound, time left."""

from __future__ import annotations

import os
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate

from tqdm import tqdm

from captions import Caption

_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} sentences{postfix}, {remaining} left"
_REDRAW_SECONDS = 0.1
_USUAL_WIDTH = 80


class ProgressBar:
    """On standard error, if that is a terminal; else silent. The bar is for texts of two sentences and more.

    A caption may hold several sentences (a model's sentence group), or a part of a long one, so what has been said is counted in
    characters, without spaces.

    Args:
        sentences: Of the whole text.
    """

    def __init__(self, sentences: Sequence[str]) -> None:
        self._ends = list(accumulate(_size(sentence) for sentence in sentences))
        self._shown = sys.stderr is not None and sys.stderr.isatty()
        self._captions: list[Caption] = []
        self._heard = 0
        self._characters = 0
        self._bar: tqdm[None] | None = None
        self._drawn = 0.0
        self._told = ""

    def tell(self, line: str) -> None:
        """Show what is being waited for, until the next line; "" removes it."""
        if not self._shown or line == self._told or self._bar:
            return
        self._told = line
        sys.stderr.write(f"\r\033[K{line[: _width()]}")
        sys.stderr.flush()

    def warn(self, line: str) -> None:
        """Say something that is to be read in any case, terminal or not."""
        self.tell("")
        if sys.stderr is not None:
            print(f"say.py: {line}", file=sys.stderr)

    def caption(self, caption: Caption) -> None:
        """A sentence group has been made."""
        self._captions.append(caption)

    def move(self, seconds: float) -> None:
        """The sound has arrived where it goes, up to here (in seconds at speed 1)."""
        if not self._shown or len(self._ends) < 2:
            return
        while self._heard < len(self._captions) and self._captions[self._heard].end <= seconds + 0.001:
            self._characters += _size(self._captions[self._heard].text)
            self._heard += 1
        if self._bar is None:
            self.tell("")
            self._bar = _new_bar(len(self._ends))
        self._draw(bisect_right(self._ends, self._characters), seconds)

    def finish(self, seconds: float) -> None:
        """All is done."""
        if self._bar is not None:
            self._drawn = 0.0
            self._draw(len(self._ends), seconds)

    def close(self) -> None:
        """Leave the line."""
        self.tell("")
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _draw(self, done: int, seconds: float) -> None:
        bar = self._bar
        if bar is None or time.monotonic() - self._drawn < _REDRAW_SECONDS:
            return
        self._drawn = time.monotonic()
        bar.n, bar.ncols = done, _width()
        bar.set_postfix_str(f"{seconds:.0f} s of sound", refresh=False)
        bar.refresh()


def _width() -> int:
    """Of the terminal that the bar is on, less the last column, where some would break the line. Some say 0 for a width unknown."""
    with suppress(OSError):
        return (os.get_terminal_size(sys.stderr.fileno()).columns or _USUAL_WIDTH) - 1
    return _USUAL_WIDTH - 1


def _size(text: str) -> int:
    return len("".join(text.split()))


def _new_bar(total: int) -> tqdm[None]:
    # By default tqdm takes a lock that works between processes (some systems run a helper process for it) and a thread that watches.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    # It measures the terminal as well, and shows nothing on one of a height unknown: the one line that is needed is always there.
    return tqdm(total=total, bar_format=_BAR, file=sys.stderr, ncols=_width(), nrows=2, disable=False)
