"""The report: one HTML page that holds everything, with the verdict in plain words first."""

import re
import shutil
import subprocess

import pytest
from evaluations import row

from scrdit_diffusers.evaluation import compare, report


def test_report_refers_to_nothing_outside_itself(html):
    assert not re.findall(r"https?://|<script|<link|@import|url\(", html)
    assert set(re.findall(r"(?:src|href)=\"([^;]*);", html)) == {"data:image/png"}


def test_report_embeds_every_figure(html):
    assert html.count("data:image/png;base64,iVBOR") == html.count("<img") == 9


def test_report_begins_with_the_verdict(html, record):
    auroc = row(record, "classifier_genes_auroc")
    first = html[: html.index("<table")]
    assert f"AUROC {auroc['value']:.2f} (0.50: indistinguishable; real cells {auroc['ceiling']:.2f}" in first
    assert f"Gaussian copula {auroc['gaussian_copula']:.2f}" in first
    assert "Not met: " in first and "memorization" in first and "Labels: " in first


def test_report_marks_labels_of_few_training_cells(html):
    assert "rare †" in html and "T cell †" not in html


def test_report_has_a_row_for_each_metric(html, record):
    for figures in record["rows"]:
        assert f"<th>{compare.METRIC_NAMES[figures['metric']]}</th>" in html


def test_verdict_of_real_cells_is_clean(record):
    """The ceiling in place of the generated cells: what real cells reach has to pass."""
    names = {"classifier_genes_auroc": 0.5, "nearest_train_distance_ratio": 1.0, "share_nearer_to_train": 0.5}
    names |= {"share_duplicates_of_train": 0.0, "w2": 2.0}
    rows = [
        dict(metric=metric, group="all", n_cells=50, value=x, ceiling=x, aim="", met=True)
        for metric, x in names.items()
    ]
    sentences = report.verdict({"rows": rows, "baselines": [], "labels": {}})
    assert "5 of 5 aims are met." in sentences and "No sign of memorization" in sentences[-1]


def test_verdict_names_memorization():
    names = {"classifier_genes_auroc": 0.5, "nearest_train_distance_ratio": 0.2, "share_nearer_to_train": 0.9}
    rows = [
        dict(metric=metric, group="all", n_cells=50, value=x, ceiling=0.5, aim="", met=x == 0.5)
        for metric, x in (names | {"share_duplicates_of_train": 0.3}).items()
    ]
    assert "Possible memorization: 30.0%" in report.verdict({"rows": rows, "baselines": [], "labels": {}})[-1]


def test_report_fits_a_phone(html, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    measure = "<script>document.title = `${document.documentElement.scrollWidth} of ${innerWidth}`</script>"
    (tmp_path / "report.html").write_text(html + measure, encoding="utf-8")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=500,900", "--dump-dom", (tmp_path / "report.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    width, window = map(int, re.search(r"<title>(\d+) of (\d+)</title>", dom).groups())
    assert width <= window <= 500
