"""Time and memory of a piece of code; needs only Python, so that other environments can use it.

Used by data.py and annbatch_loader.py, and by speed.py, whose two sides are processes that run this file.
"""

import argparse
import importlib.util
import inspect
import sys
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


def answer(benchmark: str, device: str, dtype: str, num_genes: str, distilled: str) -> None:
    """Measure by the functions of a file like speed.py, of any commit; for each task read, write a rate."""
    spec = importlib.util.spec_from_file_location("benchmark", benchmark)
    assert spec is not None and spec.loader is not None
    side = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(side)
    side.torch.set_flush_denormal(True)
    side.NUM_GENES = int(num_genes)
    args = argparse.Namespace(device=device, dtype=dtype, compile=False, distilled=int(distilled))
    batch = 128 if device == "cpu" else 4096
    num_calls = inspect.signature(side.SCRDiTPipeline.__call__).parameters["num_inference_steps"].default
    num_calls = args.distilled or num_calls
    for line in sys.stdin:
        if line.strip() == "training":
            rate = side.train_rate(side.DEFAULT, batch, 4, args)[0]
        else:
            args.dtype = "float32"  # of the weights
            rate = side.sample_rate(side.DEFAULT, 4 * batch, num_calls, 2, args)
            args.dtype = dtype
        print(rate, flush=True)


if __name__ == "__main__":
    answer(*sys.argv[1:])
