"""What the starts of a command have traced, one after another, in one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias

from helios.verifying.comparing import Run

Traces: TypeAlias = dict[tuple[str, int], Run]  # by run and rank, in their order
Place: TypeAlias = tuple[str, int]  # a run, and a batch of it


class Starts:
    """The traces of a folder, and where each start has gone on."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lines = folder, dict[Path, int]()
        self._stop: Place | None = None  # of the last start

    def read(self) -> Traces:
        """All traces so far."""
        traces = Traces()
        files = self._folder.glob("*.rank_*.jsonl")
        for path in sorted(files, key=lambda file: file.stat().st_mtime_ns):
            which, _, rank = path.stem.rpartition(".rank_")
            traces[which, int(rank)] = Run.read(path)
        return traces

    def wrong_with(self, stop: Place | None) -> str | None:
        """What is wrong with the start that was to stop there; call it after each."""
        before, self._stop = self._stop, stop
        for path in self._folder.glob("*.rank_*.jsonl"):
            lines = path.read_text(encoding="utf-8").splitlines()
            new = map(json.loads, lines[self._lines.get(path, 0) :])
            self._lines[path] = len(lines)
            first = next((line["batch"] for line in new if "batch" in line), None)
            is_same = before and path.stem.rpartition(".rank_")[0] == before[0]
            if before and is_same and first not in (None, before[1] + 1):
                return (
                    f"was stopped after batch {before[1]}, and has gone on with batch "
                    f"{first} of it: its checkpoint was not taken up"
                )
        return None
