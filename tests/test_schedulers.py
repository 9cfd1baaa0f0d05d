"""Every scheduler of the installed diffusers: it samples an scRDiT model correctly, or is refused with a reason."""

import importlib
import inspect
import json
import pkgutil

import anndata as ad
import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from scripts import load_script
from sklearn.ensemble import RandomForestClassifier

from scrdit_diffusers import SCRDiTPipeline, SCRDiTTransformer, default_scheduler
from scrdit_diffusers.count_head import CountPosterior
from scrdit_diffusers.evaluation import compare
from scrdit_diffusers.finetuning import add_lora
from scrdit_diffusers.schedulers import DISTILLED, SCHEDULERS, check_scheduler, distilled_for
from scrdit_diffusers.transformer_scrdit import SCRDiTTransformerOutput

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
NOISE_SCHEDULES = ("linear", "squaredcos_cap_v2")
SUPPORTED = sorted(name for name, verdict in SCHEDULERS.items() if verdict.prediction_types)
COUNT_SCHEDULERS = [name for name in SUPPORTED if "sample" in SCHEDULERS[name].prediction_types]
MEAN, STD = 5.0, 3.0
TOLERANCE = 0.25  # of mean and standard deviation, in 50 steps; the linear schedule alone costs DDIM and UniPC 0.13


def find_schedulers():
    """All scheduler classes that diffusers exports or defines below `diffusers.schedulers`, by name."""
    package = diffusers.schedulers
    modules = [m.name for m in pkgutil.walk_packages(package.__path__, "diffusers.schedulers.") if "flax" not in m.name]
    spaces = [vars(importlib.import_module(name)) for name in modules]
    spaces.append({name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")})
    classes = {c for space in spaces for c in space.values() if inspect.isclass(c) and issubclass(c, SchedulerMixin)}
    return {c.__name__: c for c in sorted(classes - {SchedulerMixin}, key=lambda c: c.__name__)}


CLASSES = find_schedulers()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def swap(pipe, name, prediction_type="epsilon", beta_schedule="linear"):
    """The one-line swap that users write, on a pipeline that was trained with this prediction type and schedule."""
    pipe.__init__(pipe.transformer, default_scheduler(prediction_type, beta_schedule), pipe.processor)
    pipe.scheduler = CLASSES[name].from_config(pipe.scheduler.config)
    return pipe


class ExactDenoiser:
    """What a perfect network returns for model-space values that are N(5, 3^2)."""

    def __init__(self, prediction_type, beta_schedule):
        self.prediction_type = prediction_type
        self.log_alphas_cumprod = default_scheduler(beta_schedule=beta_schedule).alphas_cumprod.double().log()

    def __call__(self, x, timestep, **kwargs):
        t = timestep.double()
        low, high = t.floor().long().clamp(0, 999), t.ceil().long().clamp(0, 999)
        log_a = torch.lerp(self.log_alphas_cumprod[low], self.log_alphas_cumprod[high], t - low)[:, None]
        a, x = log_a.exp(), x.double()  # x = sqrt(a) x0 + sqrt(1 - a) eps
        gain = a.sqrt() * STD**2 / (a * STD**2 + 1 - a)
        x0 = MEAN + gain * (x - a.sqrt() * MEAN)  # E[x0 | x]
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * x0
        prediction = dict(epsilon=eps, v_prediction=v, sample=x0)[self.prediction_type]
        return SCRDiTTransformerOutput(sample=prediction.float())


@pytest.fixture
def sample_exactly(pipe, monkeypatch):
    """Mean and standard deviation of the cells that a scheduler makes with the exact denoiser."""

    def sample_exactly(name, prediction_type, beta_schedule, **kwargs):
        swap(pipe, name, prediction_type, beta_schedule)
        monkeypatch.setattr(pipe.transformer, "forward", ExactDenoiser(prediction_type, beta_schedule))
        samples = pipe(200, num_inference_steps=50, generator=seeded(), output_type="latent", **kwargs).samples
        return samples.mean().item(), samples.std().item()

    return sample_exactly


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_every_scheduler_of_diffusers_has_a_verdict_and_the_other_way_round():
    new, gone = set(CLASSES) - set(SCHEDULERS), set(SCHEDULERS) - set(CLASSES)
    assert not new, (
        f"diffusers {diffusers.__version__} has schedulers that SCHEDULERS in scrdit_diffusers/schedulers.py does not "
        f"know: {sorted(new)}. Add each as SchedulerVerdict(_ALL) and run this file: the tests tell which prediction "
        "types and noise schedules it gets right. If none, refuse it: SchedulerVerdict((), reason)."
    )
    assert not gone, f"diffusers {diffusers.__version__} has no {sorted(gone)}: take out of SCHEDULERS what is gone."


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_refusal_has_a_reason(name):
    verdict = SCHEDULERS[name]
    assert verdict.reason or set(verdict.prediction_types) == set(PREDICTION_TYPES)


CASES = [(name, p, s) for name in SUPPORTED for p in SCHEDULERS[name].prediction_types for s in NOISE_SCHEDULES]
ACCEPTED = [case for case in CASES if case[2] == "linear" or SCHEDULERS[case[0]].any_schedule]
REFUSED_SCHEDULES = [case for case in CASES if case not in ACCEPTED]
REFUSED_TYPES = [(name, p) for name in CLASSES for p in PREDICTION_TYPES]
REFUSED_TYPES = [(name, p) for name, p in REFUSED_TYPES if p not in SCHEDULERS.get(name, ((),))[0]]


@pytest.mark.parametrize(("name", "prediction_type", "beta_schedule"), ACCEPTED)
def test_supported_schedulers_reproduce_the_moments(sample_exactly, name, prediction_type, beta_schedule):
    mean, std = sample_exactly(name, prediction_type, beta_schedule)
    assert mean == pytest.approx(MEAN, abs=TOLERANCE)
    assert std == pytest.approx(STD, abs=TOLERANCE)


def assert_fails_or_distorts(sample_exactly, monkeypatch, name, prediction_type, beta_schedule):
    """Without the refusal the cells would be wrong: otherwise the verdict is, too."""
    monkeypatch.setattr("scrdit_diffusers.pipeline_scrdit.check_scheduler", lambda scheduler: None)
    monkeypatch.setattr("scrdit_diffusers.pipeline_scrdit.NOISE_PROCESS", ())
    try:
        takes_eta = "eta" in inspect.signature(CLASSES[name].step).parameters
        kwargs = {"eta": 0.3} if takes_eta else {}  # TCD's own default
        mean, std = sample_exactly(name, prediction_type, beta_schedule, **kwargs)
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError):
        return
    assert not (abs(mean - MEAN) < TOLERANCE and abs(std - STD) < TOLERANCE), f"{name} works: change its verdict"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of deprecated schedulers, and of NaN
@pytest.mark.parametrize(("name", "prediction_type"), REFUSED_TYPES)
def test_other_schedulers_are_refused_with_cause(pipe, sample_exactly, monkeypatch, name, prediction_type):
    try:
        swap(pipe, name, prediction_type)
    except (TypeError, ValueError, NotImplementedError):
        return  # cannot even be made from the config of ours
    with pytest.raises(ValueError, match=f"^{name} .* model.*UniPCMultistepScheduler"):
        pipe()
    assert_fails_or_distorts(sample_exactly, monkeypatch, name, prediction_type, "linear")


@pytest.mark.parametrize(("name", "prediction_type", "beta_schedule"), REFUSED_SCHEDULES)
def test_noise_schedules_are_refused_with_cause(
    pipe, sample_exactly, monkeypatch, name, prediction_type, beta_schedule
):
    with pytest.raises(ValueError, match=f"^{name} .*'{beta_schedule}'.*UniPCMultistepScheduler"):
        swap(pipe, name, prediction_type, beta_schedule)()
    assert_fails_or_distorts(sample_exactly, monkeypatch, name, prediction_type, beta_schedule)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDPMScheduler(), "^DDPMScheduler .*clip_sample=True"),
        (DDPMScheduler(clip_sample=False, thresholding=True), "^DDPMScheduler .*thresholding=True"),
        (FlowMatchEulerDiscreteScheduler(), "^FlowMatch.* flow .*UniPCMultistepScheduler, DDIMScheduler"),
        (diffusers.LCMScheduler(), "^LCMScheduler .* distilled .*UniPCMultistepScheduler"),
        (
            diffusers.PNDMScheduler(prediction_type="v_prediction"),
            "^PNDMScheduler .*prediction_type='v_prediction'.* noise.*UniPC",
        ),
    ],
)
def test_a_refused_scheduler_gets_a_reason_and_an_alternative(pipe, scheduler, message):
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        pipe()


def test_a_scheduler_of_diffusers_without_a_verdict_is_refused(pipe, monkeypatch):
    monkeypatch.delitem(SCHEDULERS, "UniPCMultistepScheduler")
    with pytest.raises(ValueError, match="^UniPCMultistepScheduler .* package"):
        pipe()


def test_an_adapter_that_was_not_distilled_does_not_change_the_verdicts(pipe):
    add_lora(pipe.transformer, 2, {})
    assert distilled_for(pipe.transformer) is None and pipe(1, num_inference_steps=1).adata.n_obs == 1
    pipe.scheduler = diffusers.TCDScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="^TCDScheduler .* distilled .*UniPC"):
        pipe()


@pytest.mark.parametrize("name", CLASSES)
def test_a_distilled_adapter_can_be_sampled_by_its_scheduler_alone(pipe, name):
    add_lora(pipe.transformer, 2, {})
    pipe.transformer.peft_config["default"].auto_mapping = {DISTILLED: "TCDScheduler"}
    scheduler = type(name, (SchedulerMixin,), {"config": {"prediction_type": "sample"}})()
    if name == "TCDScheduler":
        return check_scheduler(scheduler, distilled_for(pipe.transformer))
    with pytest.raises(ValueError, match=f"^{name} .*TCDScheduler.*unload_lora_weights"):
        check_scheduler(scheduler, distilled_for(pipe.transformer))


# -- schedulers of the user's own --------------------------------------------------------------------------------------


def test_a_subclass_of_a_supported_scheduler_works(pipe):
    class MyScheduler(DDIMScheduler):
        pass

    pipe.scheduler = MyScheduler.from_config(pipe.scheduler.config)
    assert pipe(num_cells=2, num_inference_steps=2).adata.uns["scrdit"]["scheduler"] == "MyScheduler"


def test_a_scheduler_of_ones_own_needs_the_noise_process(pipe):
    class MyScheduler(SchedulerMixin):
        config = dict(pipe.scheduler.config)

    with pytest.raises(ValueError, match="^MyScheduler .*init_noise_sigma .*alphas_cumprod"):
        check_scheduler(MyScheduler())


def test_a_scheduler_with_another_noise_process_is_refused(pipe):
    trained = pipe.scheduler.config
    pipe.scheduler = DDIMScheduler.from_config(trained, prediction_type="epsilon")
    with pytest.raises(ValueError, match="^DDIMScheduler .*prediction_type='epsilon'.*'sample'"):
        pipe(num_cells=1)


# -- swapping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "from a folder"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_swap_keeps_the_noise_schedule(tmp_path, name, saved):
    """`from_config` in memory drops what is at its default; Heun, KDPM2 and others would use other betas then."""
    shipped = default_scheduler("epsilon", beta_schedule="scaled_linear", num_train_timesteps=500)
    if saved:
        shipped.save_pretrained(tmp_path)
        shipped = type(shipped).from_pretrained(tmp_path)
    scheduler = CLASSES[name].from_config(shipped.config)
    betas = torch.linspace(0.0001**0.5, 0.02**0.5, 500) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod, torch.cumprod(1 - betas, dim=0))
    assert scheduler.config.prediction_type == "epsilon"
    assert not scheduler.config.get("clip_sample", False)


def test_the_shipped_scheduler_has_every_argument_explicit():
    assert default_scheduler().config.get("_use_default_values", []) == []


@pytest.mark.parametrize("name", SUPPORTED)
def test_same_seed_same_cells(pipe, name):
    swap(pipe, name)
    kwargs = dict(num_cells=4, num_inference_steps=4, output_type="latent")
    first, second, other = (pipe(**kwargs, generator=seeded(seed)).samples for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_batch_of_three_is_three_singles(pipe, generators, name):
    swap(pipe, name)
    kwargs = dict(num_inference_steps=4, output_type="latent", guidance_scale=1.5)
    together = pipe(num_cells=3, generator=generators(3), **kwargs)
    alone = [pipe(num_cells=1, generator=generators(1, start=i), **kwargs) for i in range(3)]
    torch.testing.assert_close(together.samples, torch.cat([a.samples for a in alone]), rtol=1e-4, atol=1e-4)
    assert together.obs.to_numpy().tolist() == [a.obs.to_numpy().tolist()[0] for a in alone]


# -- counts from the likelihood ----------------------------------------------------------------------------------------


@pytest.fixture
def count_pipe(count_pipe):
    """The tiny pipeline that draws counts on the linear schedule, which all schedulers can sample."""
    model, processor = count_pipe.transformer, count_pipe.processor
    linear = SCRDiTTransformer.from_config(model.config, beta_schedule="linear").eval()
    alphas_cumprod = {"count_head.alphas_cumprod": linear.count_head.alphas_cumprod}
    linear.load_state_dict(model.state_dict() | alphas_cumprod)
    pipe = SCRDiTPipeline(linear, default_scheduler(beta_schedule="linear"), processor, decode_timestep=50)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", COUNT_SCHEDULERS)
def test_every_scheduler_hands_the_cell_to_the_head_as_it_was_noised(count_pipe, adata, monkeypatch, name):
    """Denoised towards one cell, the head must get sqrt(alpha_bar) times it, also from schedulers that scale."""
    count_pipe.scheduler = CLASSES[name].from_config(count_pipe.scheduler.config)
    clean = torch.from_numpy(count_pipe.processor.transform(adata.X[:1])).float()
    seen = []
    monkeypatch.setattr(CountPosterior, "mean", lambda _, log_mean, noisy, timestep: clean.expand_as(noisy))
    sample = CountPosterior.sample
    monkeypatch.setattr(CountPosterior, "sample", lambda *args: seen.append(args) or sample(*args))
    count_pipe(num_cells=200, num_inference_steps=10, decode_timestep=500, generator=seeded())
    posterior, _, noisy, timestep, _ = seen[0]
    assert timestep.shape == (200,)
    alpha_bar = posterior.alpha_bar(timestep)[0]
    assert ((noisy.mean(0) - alpha_bar.sqrt() * clean[0]).abs() < 6 * ((1 - alpha_bar) / 200).sqrt()).all()
    assert noisy.std().item() < 1.5 * ((1 - alpha_bar) + (alpha_bar.sqrt() * clean).var()).sqrt().item()


@pytest.mark.parametrize("name", COUNT_SCHEDULERS)
def test_every_scheduler_draws_counts(count_pipe, generators, name):
    count_pipe.scheduler = CLASSES[name].from_config(count_pipe.scheduler.config)
    kwargs = dict(num_inference_steps=4, library_size=60)
    together = count_pipe(3, generator=generators(3), **kwargs).adata.X.toarray()
    alone = [count_pipe(1, generator=generators(1, start=i), **kwargs).adata.X.toarray() for i in range(3)]
    assert np.array_equal(together, np.concatenate(alone))
    assert np.array_equal(together, np.rint(together)) and together.any()


# -- training/benchmarks/schedulers.py ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark():
    """The script; what it sets for its process is put back."""
    verbosity = diffusers.logging.get_verbosity()
    yield load_script("benchmarks/schedulers")
    diffusers.logging.set_verbosity(verbosity)
    torch.set_flush_denormal(False)


def test_the_table_of_the_benchmark(benchmark):
    """Those within 0.02 of the lowest mean of both classifiers need the fewest of their calls."""
    columns = ["scheduler", "steps", "calls", *benchmark.COLUMNS, "seconds_per_1000"]
    rows = [
        ["DDIMScheduler", 10, 10, 0.56, 0.60, 0.5, 0.05, 8.0],  # mean 0.58, 0.04 above the lowest
        ["DDIMScheduler", 5, 5, 0.70, 0.40, 0.5, 0.05, 4.0],  # mean 0.55, 0.01 above
        ["HeunDiscreteScheduler", 5, 9, 0.55, 0.53, 0.625, 0.0123, 7.26],  # mean 0.54, the lowest
        ["DDPMScheduler", 5, 5, 0.50, 0.63, 0.5, 0.05, 4.0],  # mean 0.565, although the lowest by genes
        ["DDPMScheduler", 10, 10, 0.50, 0.63, 0.5, 0.05, 8.0],
    ]
    real = dict(zip(benchmark.COLUMNS, [0.5, 0.51, 0.49, 0.04], strict=True))
    header, _, *lines = benchmark.format_table(pd.DataFrame(rows, columns=columns), real).splitlines()
    assert header.startswith("| scheduler | calls needed | genes, AUROC, 5 / 10 calls | PCs, AUROC, 5 / 10 calls |")
    assert lines == [
        "| DDIM | 5 | 0.700 / 0.560 | 0.400 / 0.600 | 0.500 / 0.500 | 0.050 / 0.050 | 4.0 / 8.0 |",
        "| DDPM | more than 10 | 0.500 / 0.500 | 0.630 / 0.630 | 0.500 / 0.500 | 0.050 / 0.050 | 4.0 / 8.0 |",
        "| HeunDiscrete | 9 | 0.550 / – | 0.530 / – | 0.625 / – | 0.012 / – | 7.3 / – |",
        "| other real cells |  | 0.500 | 0.510 | 0.490 | 0.040 |  |",
    ]


def test_the_benchmark_evaluates_the_cells_it_generated(benchmark, count_pipe, adata, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "RandomForestClassifier", lambda n, **kwargs: RandomForestClassifier(5, **kwargs))
    count_pipe.save_pretrained(tmp_path / "pipeline")
    parts = {name: adata[i::3].copy() for i, name in enumerate(("train", "test", "control"))}
    for name, cells in parts.items():
        cells.write_h5ad(tmp_path / f"{name}.h5ad")

    def run(*arguments):
        command = ["--pipeline", tmp_path / "pipeline", "--split_dir", tmp_path, "--output_dir", tmp_path / "out"]
        command += ["--calls", 2, 3, "--schedulers", "DDIMScheduler", "--n_jobs", 1, *arguments]
        monkeypatch.setattr("sys.argv", ["schedulers.py", *map(str, command)])
        benchmark.main()
        return json.loads((tmp_path / "out" / "schedulers.json").read_text())

    output = run()
    assert [(row["scheduler"], row["calls"]) for row in output["results"]] == [("DDIMScheduler", n) for n in (2, 3)]
    order = np.random.default_rng(0)
    test, control = (parts[name][order.choice(20, 20, replace=False)].copy() for name in ("test", "control"))
    cells = ad.read_h5ad(tmp_path / "out" / "DDIMScheduler-2.h5ad")
    assert cells.obs["cell_type"].tolist() == test.obs["cell_type"].tolist()
    assert (cells.uns["scrdit"]["scheduler"], cells.uns["scrdit"]["num_inference_steps"]) == ("DDIMScheduler", 2)
    options = dict(value_space="counts", seed=0, n_jobs=1)
    table = compare.compare(test, cells, parts["train"], control, **options).set_index("metric")
    for metric in benchmark.COLUMNS:
        assert output["evaluated"]["DDIMScheduler-2"][metric] == pytest.approx(table.loc[metric, "value"])
        assert output["evaluated"]["real"][metric] == pytest.approx(table.loc[metric, "ceiling"])
    assert output["evaluated"]["DDIMScheduler-3"] != output["evaluated"]["DDIMScheduler-2"]
    figures = [f"{output['evaluated'][f'DDIMScheduler-{n}']['classifier_genes_auroc']:.3f}" for n in (2, 3)]
    printed = capsys.readouterr().out
    assert f"| {' / '.join(figures)} |" in printed

    monkeypatch.setattr(SCRDiTPipeline, "__call__", None)  # the same command evaluates and generates nothing anew
    monkeypatch.setattr(benchmark, "compare", None)
    assert run() == output
    assert printed.endswith(capsys.readouterr().out)
    with pytest.raises(SystemExit, match=r"schedulers\.json .*'seed': 0"):
        run("--seed", 1)
    del output["arguments"]  # as records once were
    (tmp_path / "out" / "schedulers.json").write_text(json.dumps(output))
    with pytest.raises(SystemExit, match=r"schedulers\.json .*'pipeline': None"):
        run()
