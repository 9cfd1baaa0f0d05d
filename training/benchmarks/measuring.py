"""Time and memory of a piece of code; needs only Python, so that other environments can use it.

Used by data.py and annbatch_loader.py.
"""

import threading
import time
from pathlib import Path


class PeakMemory:
    """Peak anonymous resident set of this process in MB, minus that at the start, sampled every 5 ms."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = self.now()
        self.running = True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.running = False
        self.thread.join()

    @staticmethod
    def now() -> float:
        """Anonymous resident set in MB."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

    def watch(self) -> None:
        """Sample until the end."""
        while self.running:
            self.peak = max(self.peak, self.now())
            time.sleep(0.005)

    @property
    def megabytes(self) -> float:
        """Peak in MB, minus the start."""
        return self.peak - self.start


class Clock:
    """Wall time and CPU time of this process; CPU time is fairer on a machine that others use."""

    def __init__(self) -> None:
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def rates(self, num_cells: int) -> dict[str, float]:
        """Cells per second of wall time and of CPU time."""
        wall, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu_start
        return {"cells_per_second": num_cells / wall, "cells_per_cpu_second": num_cells / cpu}
