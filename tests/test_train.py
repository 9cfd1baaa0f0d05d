"""The training script, run as a user runs it."""

import json
import re
import sys

import anndata as ad
import numpy as np
import pytest
import torch
from scripts import TINY, logged, run, weights

from scrdit_diffusers import CellDataset, SCRDiTPipeline
from scrdit_diffusers.values import normalize_log1p


def test_output_dir_is_a_pipeline(trained):
    pipe = SCRDiTPipeline.from_pretrained(trained)
    adata = pipe(5, conditions={"cell_type": "B cell"}, num_inference_steps=3).adata
    assert adata.shape == (5, 30) and np.array_equal(adata.X.data, np.rint(adata.X.data))


def test_weights_moved(trained):
    assert weights(trained)["proj_out.weight"].abs().max() > 0  # zero when training starts


def test_config_checkpoints_figures_and_logs_are_written(trained):
    config = json.loads((trained / "train_config.json").read_text())
    assert config["labels_key"] == ["cell_type"] and config["max_train_steps"] == 8
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert sorted(path.name for path in (trained / "samples").iterdir()) == ["step-4.png", "step-8.png"]
    assert list((trained / "logs").rglob("events.out*"))


def test_the_config_names_commit_and_hardware(trained):
    config = json.loads((trained / "train_config.json").read_text())
    assert config["hardware"]
    if config["commit"] is None:
        pytest.skip("not a git checkout")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", config["commit"])


def test_only_held_out_cells_give_a_validation_loss(train_here, trained, dataset, tmp_path):
    assert logged(trained) and not logged(trained, "val_loss")
    train_here(dataset, tmp_path, "--val_fraction", "0.1", "--report_to", "tensorboard")
    assert [step for step, _ in logged(tmp_path, "val_loss")] == [4, 8]
    config = json.loads((tmp_path / "train_config.json").read_text())
    assert (config["train_cells"], config["val_cells"]) == (81, 9)


# 81 training cells and 16 per step: batches go from one epoch to the next.
TWO = ["--labels_key", "cell_type", "--dropout", "0", "--max_train_steps", "12", "--validation_steps", "100"]
TWO += ["--val_fraction", "0.1"]
# With its usual epsilon Adam makes full steps of gradients that are rounding errors, such as that of the keys' bias.
TWO += ["--adam_epsilon", "1e-3"]


def assert_close_weights(two, one):
    """Weights are equal up to the rounding of their gradients."""
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        # Steps of shapes are long, and near the Poisson limit a dispersion's gradient is a difference of large numbers.
        atol = 2e-3 if name.endswith("log_dispersion") else 1e-4 if name.endswith("log_base") else 1e-5
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=atol)


def test_two_processes_train_as_one_does_on_the_joined_batch(train_here, dataset, tmp_path):
    train_here(dataset, tmp_path / "one", *TWO, "--report_to", "tensorboard")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "training/train.py",
    ]
    command = [*launch, "--dataset", str(dataset), "--output_dir", str(tmp_path / "two"), *TINY, *TWO]
    result = run([*command, "--train_batch_size", "8", "--report_to", "tensorboard"])
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "two" / "train_config.json").read_text())["num_processes"] == 2
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    start = weights(tmp_path / "one" / "checkpoint-9")
    assert_close_weights(two, one)
    assert max((start[name] - tensor).abs().max() for name, tensor in one.items()) > 1e-3  # what is compared moves
    np.testing.assert_allclose(logged(tmp_path / "two"), logged(tmp_path / "one"), rtol=1e-5)


def test_accumulated_gradients_train(train_here, dataset, tmp_path):
    train_here(dataset, tmp_path, "--gradient_accumulation_steps", "2", "--train_batch_size", "8", "--use_ema", "False")
    assert (tmp_path / "model_index.json").exists()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_other_prediction_types_and_log_normalized_values_train(train_here, dataset, tmp_path, prediction_type):
    arguments = ["--value_space", "log_normalized", "--target_sum", "1e4", "--zero_negation", "True"]
    arguments += ["--decode", "round"]
    arguments += ["--prediction_type", prediction_type, "--beta_schedule", "linear", "--patch_embed_type", "shared"]
    train_here(dataset, tmp_path, *arguments)
    adata = SCRDiTPipeline.from_pretrained(tmp_path)(3, num_inference_steps=3).adata
    assert adata.n_obs == 3 and "counts" not in adata.layers


def test_log_normalized_values_train_as_the_counts_behind_them(train_here, dataset, tmp_path):
    """Of all genes and from the same seed: the same weights."""
    adata = ad.read_h5ad(dataset)
    adata.X = normalize_log1p(adata.X, 1e4).astype(np.float32)
    adata.write_h5ad(tmp_path / "log.h5ad")
    genes = tmp_path / "genes.txt"
    genes.write_text("\n".join(adata.var_names))
    arguments = ["--labels_key", "cell_type", "--genes", str(genes)]
    train_here(dataset, tmp_path / "counts", *arguments)
    train_here(tmp_path / "log.h5ad", tmp_path / "log", *arguments, "--value_space", "log_normalized")
    assert_close_weights(weights(tmp_path / "log"), weights(tmp_path / "counts"))
    of_log, of_counts = (SCRDiTPipeline.from_pretrained(tmp_path / name) for name in ("log", "counts"))
    options = dict(num_cells=5, num_inference_steps=3)
    cells = of_log(**options, generator=torch.manual_seed(0)).adata
    counts = of_counts(**options, generator=torch.manual_seed(0)).adata.X
    np.testing.assert_allclose(cells.X.toarray(), normalize_log1p(counts, 1e4).toarray(), rtol=1e-4)
    assert (tmp_path / "log" / "samples").is_dir()


def test_counts_train_with_rounding(train_here, dataset, tmp_path):
    train_here(dataset, tmp_path, "--decode", "round", "--prediction_type", "epsilon", "--beta_schedule", "linear")
    pipe = SCRDiTPipeline.from_pretrained(tmp_path)
    assert pipe.transformer.count_head is None and pipe.config.decode_timestep is None
    assert "counts" in pipe(3, num_inference_steps=3).adata.layers


def test_pipeline_of_counts_has_their_noise_process(trained, dataset):
    pipe = SCRDiTPipeline.from_pretrained(trained)
    assert (pipe.config.decode_timestep, pipe.config.min_timestep) == (200, 200)
    assert sum(genes for genes, _ in pipe.transformer.config.count_bins) == 30
    assert pipe.transformer.config.beta_schedule == pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"


def test_dataset_folder_trains_as_the_file_does(train_here, trained, dataset, tmp_path):
    CellDataset.from_anndata(ad.read_h5ad(dataset)).save(tmp_path / "cells")
    train_here(tmp_path / "cells", tmp_path / "model", "--labels_key", "cell_type")
    for name, tensor in weights(trained).items():
        torch.testing.assert_close(weights(tmp_path / "model")[name], tensor, rtol=0, atol=1e-6)


def test_weight_decay_spares_the_log_means(train_here, dataset, tmp_path):
    """Decay would pull the log means of rare genes towards zero, their counts up."""
    log_means = []
    for decay in ("0", "10"):  # a decay of 0.43 in eight steps; gradients move a log mean by 0.08 at most
        output = tmp_path / decay
        train_here(dataset, output, "--adam_weight_decay", decay, "--learning_rate", "0.01", "--use_ema", "False")
        log_means.append(weights(output)["count_head.log_mean"])
        assert log_means[0].abs().max() > 1
    torch.testing.assert_close(log_means[1], log_means[0], rtol=0, atol=0.17)


def test_labels_of_few_cells_start_at_what_they_add(train_here, train_script, trained, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train_script, "FEW_CELLS", 0)  # the dataset has 90 cells
    train_here(dataset, tmp_path / "many", "--labels_key", "cell_type")
    few, many = (weights(folder)["count_head.class_log_mean"] for folder in (trained, tmp_path / "many"))
    assert few.std() > 2 * many.std() > 0
    cells = ad.read_h5ad(dataset)[:, SCRDiTPipeline.from_pretrained(trained).processor.var_names]
    is_first = (cells.obs["cell_type"] == sorted(cells.obs["cell_type"].unique())[0]).to_numpy()
    means = [np.asarray(cells.X[of_label].mean(axis=0)).ravel() + 0.1 for of_label in (is_first, ~is_first)]
    assert np.corrcoef(np.log(means[0] / means[1]), few[0] - few[1])[0, 1] > 0.9


def test_nan_guard_names_step_and_cause(train_here, dataset, tmp_path):
    arguments = ["--learning_rate", "1e30", "--lr_warmup_steps", "0", "--max_grad_norm", "1e30"]
    with pytest.raises(FloatingPointError, match=r"step \d+ .*--learning_rate"):
        train_here(dataset, tmp_path, *arguments)


def test_a_published_dataset_trains_as_the_file_does(train_here, trained, parquet_folder, tmp_path):
    train_here(parquet_folder, tmp_path, "--labels_key", "cell_type")
    for name, tensor in weights(trained).items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor, rtol=0, atol=1e-6)


def test_a_streamed_dataset_trains(train_here, parquet_folder, tmp_path):
    """Eight steps of 16 of its 90 cells: into a second epoch."""
    train_here(parquet_folder, tmp_path, "--labels_key", "cell_type", "--streaming", "True")
    assert weights(tmp_path)["proj_out.weight"].abs().max() > 0
    assert sum(number for *_, number in SCRDiTPipeline.from_pretrained(tmp_path).processor.composition) == 90


def test_several_files_train(train_here, dataset, tmp_path):
    adata = ad.read_h5ad(dataset)
    (tmp_path / "cells").mkdir()
    adata[:40].copy().write_h5ad(tmp_path / "cells" / "a.h5ad")
    adata[40:, ::-1].copy().write_h5ad(tmp_path / "cells" / "b.h5ad")
    train_here(tmp_path / "cells", tmp_path / "model", "--labels_key", "cell_type")
    processor = SCRDiTPipeline.from_pretrained(tmp_path / "model").processor
    assert sum(number for *_, number in processor.composition) == 90


def test_another_accumulation_in_the_environment_is_refused(train_here, dataset, tmp_path, monkeypatch):
    """Accelerate takes it without a word."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="--gradient_accumulation_steps is 1.* 4:"):
        train_here(dataset, tmp_path)
