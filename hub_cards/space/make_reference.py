r"""Make the file of real cells that the Space shows beside new ones: the genes and conditions of a pipeline.

    python training/evaluate.py --dataset pbmc_zheng_facs.h5ad --labels_key cell_type --split_dir split
    python hub_cards/space/make_reference.py --cells split/test.h5ad \
        --pipeline hub_cards/scrdit-pbmc-zheng \
        --about "the test cells of Zheng et al. 2017 (10x Genomics, CC BY 4.0), which the model has not seen"

writes `reference/scrdit-pbmc-zheng.h5ad` beside this script.
"""

import argparse
from pathlib import Path

import anndata as ad
import numpy as np

from scrdit_diffusers import SCRDiTPipeline

MAX_CELLS = 1000


def main() -> None:
    """Write `reference/NAME.h5ad` beside this script, where NAME is that of the pipeline's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, required=True, help="Real cells, best those that the model has not seen.")
    parser.add_argument("--pipeline", type=Path, required=True, help="Folder of the pipeline.")
    parser.add_argument("--about", required=True, help="What these cells are: 'The figures show 776 real cells: ...'.")
    args = parser.parse_args()

    processor = SCRDiTPipeline.from_pretrained(args.pipeline).processor
    cells = ad.read_h5ad(args.cells)
    if cells.n_obs > MAX_CELLS:
        cells = cells[np.sort(np.random.default_rng(0).choice(cells.n_obs, MAX_CELLS, replace=False))]
    values = processor.get_values(cells)  # (cells, G)
    reference = ad.AnnData(values, obs=cells.obs[processor.condition_keys].copy())
    reference.var_names = processor.var_names
    reference.uns |= {"about": args.about, "source": cells.uns.get("source", {})}
    file = Path(__file__).parent / "reference" / f"{args.pipeline.resolve().name}.h5ad"
    file.parent.mkdir(exist_ok=True)
    reference.write_h5ad(file, compression="gzip")
    print(f"{file}: {reference.n_obs:,} cells, {reference.n_vars:,} genes, {file.stat().st_size / 1e3:,.0f} kB")


if __name__ == "__main__":
    main()
