"""The annbatch part of data.py, which may run in another Python with only anndata and annbatch.

    python training/benchmarks/annbatch_loader.py cells.h5ad store.zarr --batch_size 128 --seconds 5

Prints JSON: cells per second and peak memory of writing annbatch's store and of reading random sparse batches from it.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import annbatch
import zarr
from measuring import Clock, PeakMemory  # beside this file

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("file")
parser.add_argument("store")
parser.add_argument("--batch_size", type=int, default=128)
parser.add_argument("--seconds", type=float, default=5)
args = parser.parse_args()
warnings.simplefilter("ignore")

if Path(args.store).exists():
    raise FileExistsError(f"{args.store} exists: delete it, or its conversion cannot be measured.")
with PeakMemory() as memory:
    clock = Clock()
    annbatch.DatasetCollection(zarr.open_group(args.store, mode="w")).add_adatas([args.file])
    loader = annbatch.Loader(batch_size=args.batch_size, shuffle=True, chunk_size=256, preload_nchunks=32)
    loader.use_collection(annbatch.DatasetCollection(zarr.open_group(args.store, mode="r")))
    rates = clock.rates(loader.n_obs)
convert = rates | {"megabytes": memory.megabytes}
with PeakMemory() as memory:
    num_cells, clock = 0, Clock()
    while time.perf_counter() - clock.start < args.seconds:
        for batch in loader:
            num_cells += batch["X"].shape[0]
            if time.perf_counter() - clock.start > args.seconds:
                break
    rates = clock.rates(num_cells)
print(json.dumps({"convert": convert, "read": rates | {"megabytes": memory.megabytes}}))
