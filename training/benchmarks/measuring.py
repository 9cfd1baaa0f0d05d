"""Time and memory of a piece of code; needs nothing but Python, so that other environments can use it.

Used by data.py and annbatch_loader.py.
"""

import threading
import time
from pathlib import Path


class PeakMemory:
    """Largest anonymous resident set of this process in MB, less that at the beginning, sampled every 5 ms."""

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
        """The largest one."""
        return self.peak - self.start


class Clock:
    """Wall time, and the time that this process had a CPU: the fairer one on a machine that others use."""

    def __init__(self) -> None:
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def rates(self, num_cells: int) -> dict[str, float]:
        """Cells per second of either time."""
        wall, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu_start
        return {"cells_per_second": num_cells / wall, "cells_per_cpu_second": num_cells / cpu}
