"""Attacks on training cells and donors: copies are found, cells that give nothing away are not."""

import itertools
from collections import Counter

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from diffusers import DDPMScheduler
from scipy.stats import gmean
from scripts import load_script
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from transformers import HfArgumentParser

from scrdit_diffusers import CellCollator, CellDataset, SCRDiTPipeline, SCRDiTProcessor, diffusion_loss
from scrdit_diffusers.evaluation import privacy

NUM_GENES = 60


def draw_cells(n, rng, donors=1, strength=0.0):
    """Log-normalized values of cells around three centers, and their donors, who differ by `strength`."""
    centers = np.random.default_rng(1).gamma(1.0, 1.0, (3, NUM_GENES))
    donor = rng.integers(donors, size=n)
    shifts = rng.normal(0, strength, (donors, NUM_GENES)) if strength else np.zeros((donors, NUM_GENES))
    values = rng.poisson(np.exp(shifts[donor]) * centers[rng.integers(3, size=n)])
    return sp.csr_matrix(np.log1p(values)), donor.astype(str)


@pytest.fixture(scope="module")
def cells():
    """Disjoint draws from one distribution: train, unseen, and others."""
    rng = np.random.default_rng(0)
    return {name: draw_cells(n, rng)[0] for name, n in (("train", 400), ("unseen", 500), ("others", 400))}


@pytest.fixture(scope="module")
def attacked(cells):
    train = cells["train"]
    noise = np.random.default_rng(1).normal(0, 0.1, train.shape)
    sets = {"copies": train, "nearly": sp.csr_matrix(abs(train.toarray() + noise)), "others": cells["others"]}
    return privacy.attack(train, cells["unseen"], sets).set_index(["attack", "source"])


# -- cells -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["copies", "nearly"])
def test_a_generator_that_copies_training_cells_is_found(attacked, source):
    assert attacked.loc[("distance", source), "auroc"] > 0.99
    assert attacked.loc[("density", source), "auroc"] > (0.99 if source == "copies" else 0.6)


@pytest.mark.parametrize("attack", ["distance", "density"])
@pytest.mark.parametrize("source", ["others", "real"])
def test_disjoint_real_cells_give_nothing_away(attacked, attack, source):
    auroc, spread = attacked.loc[(attack, source), ["auroc", "std"]]
    assert abs(auroc - 0.5) < 3 * spread and 0 < spread < 0.03


def test_a_copy_of_every_cell_tells_nothing(cells):
    both = sp.vstack([cells["train"], cells["unseen"]])
    table = privacy.attack(cells["train"], cells["unseen"], {"value": both}).set_index(["attack", "source"])
    assert abs(table.loc[("distance", "value"), "auroc"] - 0.5) < 3 * table.loc[("distance", "value"), "std"]


def test_distances_to_neighbors_are_averaged_in_logs():
    distances = np.random.default_rng(0).uniform(size=(20, 30))
    nearest = np.sort(distances, axis=1)
    np.testing.assert_allclose(
        privacy.mean_log_distance(distances, 5), np.log(gmean(nearest[:, :5], axis=1)), atol=1e-6
    )
    np.testing.assert_allclose(privacy.mean_log_distance(distances, 99), np.log(gmean(nearest, axis=1)), atol=1e-6)


def test_placements_are_the_auroc_with_ties():
    rng = np.random.default_rng(0)
    members, others = rng.integers(6, size=50) + 1, rng.integers(6, size=70)
    of_members, of_others = privacy.placements(members, others)
    expected = roc_auc_score(np.repeat([1, 0], [50, 70]), np.concatenate([members, others]))
    assert of_members.mean() == pytest.approx(expected) and of_others.mean() == pytest.approx(expected)


def test_standard_error_is_the_spread_over_draws():
    rng = np.random.default_rng(0)
    draws = [(rng.normal(0.3, 1, 60), rng.normal(0, 1, 90)) for _ in range(400)]
    scores = [np.concatenate(pair)[None, None] for pair in draws]
    figures = pd.DataFrame([privacy._cells_auroc(score, 60, np.zeros(90, int)) for score in scores])
    assert figures["std"].mean() == pytest.approx(figures["auroc"].std(), rel=0.1)


# -- donors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_place_among_donors_is_that_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    scores, trained = rng.normal(size=8), 3
    found = privacy.donor_auroc(scores[:trained].tolist(), scores[trained:].tolist())
    aurocs = []
    for chosen in itertools.combinations(range(8), trained):
        aurocs.append(roc_auc_score(np.isin(np.arange(8), chosen), scores))
    assert found["auroc"] == pytest.approx(aurocs[0])
    assert found["place"] == pytest.approx(np.mean(np.array(aurocs) >= aurocs[0] - 1e-9))
    assert found["std"] == pytest.approx(np.std(aurocs))


def test_donors_are_told_apart_by_cells_like_theirs():
    cells, donor = draw_cells(1600, np.random.default_rng(0), donors=8, strength=0.7)
    trained = np.isin(donor, list("0123"))
    odd = np.arange(1600) % 2 == 1  # stand for generated cells: no copies, but of the same donors
    sides = trained & ~odd, ~trained
    table = privacy.attack(
        cells[sides[0]], cells[sides[1]], {"value": cells[trained & odd]}, donors=(donor[sides[0]], donor[sides[1]])
    )
    figures = table.set_index(["unit", "attack", "source"]).loc["donors"]
    for attack in ("distance", "density"):
        assert figures.loc[(attack, "value"), "auroc"] == 1
        assert figures.loc[(attack, "value"), "place"] == pytest.approx(1 / 70)
        assert figures.loc[(attack, "real"), "place"] > 0.05
        assert set(figures.loc[(attack, "value"), "scores"]) == set("01234567")


@pytest.mark.parametrize(
    ("donors", "message"),
    [((list("aab"), list("bcd")), "donors.*b.*both"), ((list("aab"), list("ccc")), "donors.*1.*at least 2")],
)
def test_donors_that_cannot_be_told_apart_are_refused(donors, message):
    cells = sp.csr_matrix(np.eye(3))
    with pytest.raises(ValueError, match=message):
        privacy.attack(cells, cells, {"value": cells}, donors=tuple(map(np.array, donors)))


# -- the model itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["pipe", "count_pipe"])
def test_losses_are_those_of_training(request, fixture, adata):
    pipe = request.getfixturevalue(fixture)
    losses = privacy.denoising_losses(pipe, adata, num_draws=2, seed=3)
    counts = pipe.transformer.count_head is not None
    data = CellDataset.from_anndata(adata, obs_columns=["cell_type", "batch"])
    batch = CellCollator(pipe.processor, data.var, expect_counts=counts)(
        data.sample(60, ["cell_type", "batch"], np.random.default_rng(0))
    )
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    noise = torch.randn((2, 23), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = [
            diffusion_loss(pipe.transformer, scheduler, batch, torch.full((60,), t), noise[i].expand(60, -1))
            for i, t in enumerate((250, 750))
        ]
    np.testing.assert_allclose(losses, sum(expected) / 2, rtol=1e-5)


def test_loss_of_a_cell_does_not_depend_on_the_others(count_pipe, adata):
    losses = privacy.denoising_losses(count_pipe, adata, num_draws=2)
    some = privacy.denoising_losses(count_pipe, adata[10:20], num_draws=2, batch_size=3)
    np.testing.assert_allclose(some, losses[10:20], rtol=1e-5)


def test_lower_losses_than_expected_of_their_kind_betray_training_cells(cells):
    rng = np.random.default_rng(0)
    kind = PCA(1, random_state=0).fit(cells["others"].toarray())  # losses depend above all on what kind of cell it is
    losses = []
    for part, gain in ((cells["train"], 0.5), (cells["unseen"], 0.0)):
        values = kind.transform(part.toarray())[:, 0]
        losses.append(values - gain + rng.normal(0, 0.3, len(values)))
    plain = roc_auc_score(np.repeat([1, 0], [400, 500]), -np.concatenate(losses))
    table = privacy.attack(cells["train"], cells["unseen"], {"value": cells["others"]}, losses=tuple(losses))
    figures = table.set_index(["attack", "source"]).loc[("likelihood", "value")]
    assert plain < 0.65 and figures["auroc"] > 0.8


# -- copies of rare cells, and the whole -------------------------------------------------------------------------------


def to_adata(cells, label="T"):
    obs = pd.DataFrame({"cell_type": [label] * cells.shape[0]}, index=[f"{label}{i}" for i in range(cells.shape[0])])
    return ad.AnnData(sp.csr_matrix(np.rint(np.expm1(cells.toarray()))), obs=obs)


@pytest.fixture(scope="module")
def audited(cells):
    """Two of the training cells are of a rare label, and the generated cells hold the second of them."""
    rng = np.random.default_rng(5)
    strange = sp.csr_matrix(np.log1p(rng.poisson(8, (2, NUM_GENES))))
    train = to_adata(sp.vstack([strange, cells["train"][2:]]))
    unseen, generated = to_adata(cells["unseen"]), to_adata(sp.vstack([strange[1], cells["others"][1:]]))
    train.obs.loc[["T0", "T1"], "cell_type"] = "rare"
    donors = tuple(np.resize(np.array(list(names)), part.n_obs) for names, part in (("ab", train), ("cd", unseen)))
    sets = {"value": generated, "gaussian_copula": generated[:300].copy()}
    return privacy.audit(train, unseen, sets, labels_key="cell_type", donors=donors)


def test_the_copied_rare_cell_comes_first(audited):
    first = audited["rare_cells"]["closest"][0]
    assert first["cell"] == "T1" and first["label"] == "rare" and first["label_cells"] == 2
    assert first["ratio"] < 1e-3 and first["place"] == 0
    assert audited["rare_cells"]["copied"] < 0.2


def test_rare_are_few_of_a_label_and_the_farthest_tenth(audited):
    assert 40 <= audited["rare_cells"]["cells"] <= 42


def test_every_attack_stands_beside_copula_and_real_cells(audited):
    assert [(row["unit"], row["attack"]) for row in audited["rows"]] == [
        (unit, attack) for unit in ("cells", "donors") for attack in ("distance", "density")
    ]
    for row in audited["rows"]:
        for name in ("value", "gaussian_copula", "real"):
            assert 0 <= row[name] <= 1 and row[f"{name}_std"] > 0
            assert (f"{name}_place" in row) == (row["unit"] == "donors")


def test_words_give_the_figures(audited):
    text = " ".join(privacy.in_words(audited))
    cells = max((row for row in audited["rows"] if row["unit"] == "cells"), key=lambda row: row["value"])
    assert f"AUROC {cells['value']:.2f} ± {cells['value_std']:.2f}" in text
    assert f"in their place {cells['real']:.2f}" in text and "2 donors" in text
    assert "of 4" in text and "loss" not in text


# -- the benchmark -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark():
    return load_script("benchmarks/privacy")


def test_every_donor_is_in_and_out_equally_often(benchmark):
    choices = benchmark.choose_donors(list("abcdefgh"), 6, seed=0)
    assert len(choices) == 6 and all(len(choice) == 4 for choice in choices)
    assert Counter(itertools.chain.from_iterable(choices)) == dict.fromkeys("abcdefgh", 3)
    with pytest.raises(ValueError, match="--num_choices.*3"):
        benchmark.choose_donors(list("abcd"), 3, seed=0)


@pytest.fixture
def arguments(benchmark, adata, tmp_path):
    adata.obs["donor"] = np.resize(list("abcd"), 60)
    adata.write_h5ad(tmp_path / "cells.h5ad")

    def arguments(*more):
        words = ["--dataset", tmp_path / "cells.h5ad", "--labels_key", "cell_type", "--num_train_cells", 12]
        words += ["--num_unseen", 30, "--num_cells", 20, "--num_inference_steps", 2, "--output_dir", tmp_path, *more]
        parser = HfArgumentParser(benchmark.PrivacyArguments)
        return parser.parse_args_into_dataclasses(list(map(str, words)))[0]

    return arguments


def test_donors_give_equally_many_cells(benchmark, adata, arguments):
    adata.obs_names = [f"cell{i}" for i in range(60)]
    parts = benchmark.divide(adata, arguments("--split_by", "donor"), ["a", "c"], 10)
    assert parts["train"].obs["donor"].value_counts().to_dict() == {"a": 5, "c": 5}
    assert parts["others"].obs["donor"].value_counts().to_dict() == {"a": 5, "c": 5}
    assert set(parts["unseen"].obs["donor"]) == {"b", "d"} and parts["unseen"].n_obs == 30
    assert not set(parts["train"].obs_names) & set(parts["others"].obs_names)
    parts = benchmark.divide(adata, arguments(), None, 20)
    assert parts["train"].n_obs == 20 and parts["unseen"].n_obs == 30
    assert not set(parts["train"].obs_names) & set(parts["unseen"].obs_names)


def test_benchmark_trains_what_is_missing_and_prints_all(benchmark, adata, pipe, arguments, monkeypatch, capsys):
    trained = []

    def train(cells, output_dir, labels_key, **options):
        trained.append((cells.n_obs, options["max_train_steps"], options.get("dropout")))
        processor = SCRDiTProcessor.from_anndata(adata, ["cell_type", "batch"], flavor="all")
        SCRDiTPipeline(pipe.transformer, pipe.scheduler, processor).save_pretrained(output_dir)

    monkeypatch.setattr(benchmark.scrdit_diffusers, "train", train)
    grid = ["--split_by", "donor", "--max_train_steps", 3, "--options", "", "dropout=0.1"]
    benchmark.main(arguments(*grid[:4]))
    assert trained == [(12, 3, None)] * 2
    benchmark.main(arguments(*grid))
    assert trained[2:] == [(12, 3, "0.1")] * 2
    table = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| likelihood | 4 | ") for line in table) == 2
    assert sum(line.startswith("| 12 | 3 | dropout=0.1 |") for line in table) == 4
