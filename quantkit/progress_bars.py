"""Progress bars for notebooks and scripts: `quantkit.show_progress`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from quantkit.progress import Progress, ProgressCallback


@contextmanager
def show_progress() -> Iterator[ProgressCallback]:
    """Show a bar with the time left for each step of a build: widgets in a notebook with
    ipywidgets, text on stderr elsewhere.

    >>> import quantkit
    >>> with quantkit.show_progress() as progress:
    ...     results = quantkit.build("tiny-v3-rtn4", evaluate=False, on_progress=progress)
    """
    bars = dict[str, Any]()  # stage -> tqdm's bar, which is not typed

    def update(progress: Progress) -> None:
        bar = bars.get(progress.stage)
        if bar is None:
            bar = bars[progress.stage] = tqdm(
                desc=progress.stage,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}, left {remaining}{postfix}",
            )
        bar.total = progress.total
        bar.set_postfix_str(progress.note, refresh=False)
        bar.update(progress.done - bar.n)
        if progress.done >= progress.total:
            bar.refresh()

    try:
        yield update
    finally:
        for bar in bars.values():
            bar.close()
