"""Augmentation: real cells and new ones of rare labels in one AnnData."""

from collections.abc import Mapping
from itertools import count, islice
from numbers import Integral
from typing import Any

import anndata as ad
import pandas as pd

from .checks import check_label, did_you_mean, generated_cells
from .pipeline_scrdit import SCRDiTPipeline


def augment(
    pipe: SCRDiTPipeline,
    adata: ad.AnnData,
    labels_key: str,
    to: int | Mapping[str, int],
    layer: str | None = None,
    **kwargs: Any,
) -> ad.AnnData:
    """Add generated cells until each label has as many as wanted.

    Parameters
    ----------
    pipe
        A pipeline trained on cells like those of `adata`, with the condition `labels_key`.
    adata
        Cells, values as in the training data, with at least the model's genes. Those that `obs["synthetic"]` marks as
        generated, as by an earlier call, stay so.
    labels_key
        Column of `adata.obs` that holds the label.
    to
        Number of cells, real and generated, that each label with fewer is brought to; or a number for each label that
        is to grow.
    layer
        Layer that holds the values; `None` takes X.
    kwargs
        For [`SCRDiTPipeline.__call__`], such as `generator`, `batch_size` or `library_size`.

    Returns
    -------
    AnnData of the model's genes: the cells given, then the new ones. `obs["synthetic"]` tells them apart; columns of
    `obs` that are not conditions of the model are missing (NaN) for the new cells.

    Raises
    ------
    ValueError
        A label or the column is unknown, a number is not positive and whole, no label has fewer cells than wanted,
        genes are missing, the values are not what the model was trained on, or `obs["synthetic"]` holds anything but
        truth values.

    Examples
    --------
    ```python
    balanced = augment(pipe, adata, "cell_type", to=200, generator=torch.manual_seed(0))
    ```
    """
    known = pipe.processor.conditions.get(labels_key)
    if known is None:
        raise ValueError(
            f"labels_key {labels_key!r} is not a condition of the model: {list(pipe.processor.conditions)}."
        )
    check_label(adata.obs, labels_key, "adata.obs")
    present = adata.obs[labels_key].astype(object).map(str).value_counts()
    wanted = dict(to) if isinstance(to, Mapping) else {label: to for label in present.index if label in known}
    if unknown := [label for label in wanted if label not in known]:
        meant = did_you_mean(unknown, known)
        raise ValueError(f"to: {labels_key} has no label {unknown} in the model{meant} Known: {known}.")
    if bad := {label: number for label, number in wanted.items() if not isinstance(number, Integral) or number < 1}:
        raise ValueError(f"to must be a whole number of cells, at least 1, got {bad}.")
    missing = {label: number - int(present.get(label, 0)) for label, number in wanted.items()}
    labels = [label for label, number in missing.items() for _ in range(number)]
    if not labels:
        raise ValueError(f"to: every label has that many cells already: {present.to_dict()}.")
    values = pipe.processor.get_values(adata, layer)
    var = adata.var.iloc[pipe.processor.gene_columns(adata.var_names)]
    given = ad.AnnData(values, obs=adata.obs.assign(synthetic=generated_cells(adata.obs, "adata.obs")), var=var)
    new = pipe(conditions={labels_key: labels}, **kwargs).adata
    assert new is not None
    new.var_names = given.var_names
    names = (name for number in count() if (name := f"synthetic_{number}") not in given.obs_names)
    new.obs_names = list(islice(names, new.n_obs))
    joined = ad.concat([given, new], join="inner", merge="first")
    joined.obs = pd.concat([_fit_for(new.obs, given.obs), new.obs]).set_axis(joined.obs_names)
    joined.uns["scrdit"] = new.uns["scrdit"]
    return joined


def _fit_for(new: pd.DataFrame, given: pd.DataFrame) -> pd.DataFrame:
    """Convert columns of the cells given to types that the new cells can have: labels as text, truth values or none."""
    obs = given.astype(dict.fromkeys(given.select_dtypes("bool").columns.difference(new.columns), "boolean"))
    for key in new.columns.drop("synthetic").intersection(obs.columns):
        is_categorical = isinstance(obs[key].dtype, pd.CategoricalDtype)
        obs[key] = obs[key].cat.rename_categories(str) if is_categorical else obs[key].map(str, na_action="ignore")
    return obs
