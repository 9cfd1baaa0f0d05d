"""Speed of the default preset against the paper's model, side by side in one run.

    python training/benchmarks/speed.py                                        # two CPU cores: about three minutes
    python training/benchmarks/speed.py --device cuda --dtype bfloat16 --compile
    python training/benchmarks/speed.py --against COMMIT                       # ratios to an earlier commit

Both models have 2,000 genes and ten labels. The values are random; speed depends on them only through the sizes of the
counts, which resemble those of blood cells: a few for most genes, hundreds for some. Training is one optimizer step
(forward, backward, clipping, AdamW); sampling is the pipeline as a user calls it. Of the paper's 1,000 DDPM steps, a
few are measured and scaled, as all steps cost the same.

With `--against`, the default preset is measured beside that of an earlier commit, whose files are checked out beside.
Each side has a process of its own, and they take turns. Programs that run at the same time slow both down, so that the
ratio of a turn says more than either rate. Sampling is the call without further arguments (network calls, dtype),
training is that of `train.py` by default; `--dtype bfloat16` is its `--mixed_precision bf16`, on this side only, as is
`--distilled N`, which samples with N calls and an adapter as `distill.py` makes it, fused.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from diffusers import DDPMScheduler, TCDScheduler

from scrdit_diffusers import (
    SCRDiTPipeline,
    SCRDiTProcessor,
    SCRDiTTransformer,
    count_bins,
    default_scheduler,
    diffusion_loss,
    fit_preset,
)
from scrdit_diffusers.atomic import write_atomically
from scrdit_diffusers.cells.moments import CellMoments
from scrdit_diffusers.finetuning import add_lora
from scrdit_diffusers.initialization import initialize_count_head
from scrdit_diffusers.schedulers import DISTILLED, FAST_TIMESTEPS

NUM_GENES, NUM_LABELS = 2000, 10
DEFAULT, PAPER = "scrdit-s", "scrdit-paper-d1"
PAPER_STEPS = 1000
ROOT = Path(__file__).parents[2]
OLD_PLACE = Path("training/benchmark.py")  # of this file, in earlier commits


def seconds(function, repeats: int, device: str) -> float:
    """Shortest wall time of several calls after a warm-up; other programs can only make calls longer."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def synchronize(device: str) -> None:
    """Wait for what an accelerator still computes."""
    if device != "cpu":
        torch.accelerator.synchronize()


def make_counts(num_cells: int) -> np.ndarray:
    """Draw counts: means of 0.003 to 100 over the genes, negative binomial."""
    rng = np.random.default_rng(0)
    mean = np.minimum(rng.lognormal(-2, 1.7, NUM_GENES), 100)
    return rng.negative_binomial(2, 2 / (2 + mean), (num_cells, NUM_GENES)).astype(np.float32)


def make_pipeline(preset: str, device: str, dtype: torch.dtype) -> SCRDiTPipeline:
    """Make an untrained pipeline; our presets draw counts from their likelihood, the paper's round."""
    ours = not preset.startswith("scrdit-paper")
    counts = sp.csr_matrix(make_counts(1000))
    model = SCRDiTTransformer(
        num_genes=NUM_GENES,
        num_classes=[NUM_LABELS],
        count_bins=count_bins(counts) if ours else None,
        **fit_preset(preset, NUM_GENES),
    )
    processor = SCRDiTProcessor(
        var_names=[f"gene{i}" for i in range(NUM_GENES)],
        mean=np.full(NUM_GENES, 0.1),
        std=np.full(NUM_GENES, 0.3),
        condition_keys=["cell_type"],
        condition_categories=[[f"type{i}" for i in range(NUM_LABELS)]],
        composition=[[i, 1] for i in range(NUM_LABELS)],
        log_library_sizes=[[6.0, 7.0]] * NUM_LABELS,
    )
    if ours:
        model.initialize_weights()
        labels = np.arange(1000)[:, None] % NUM_LABELS
        initialize_count_head(model.count_head, CellMoments.from_counts(counts, labels), processor.mean, processor.std)
    model.to(device)
    if dtype != torch.float32:
        model.to(dtype)
    if ours:
        scheduler = default_scheduler(beta_schedule="squaredcos_cap_v2")
        options = dict(decode_timestep=200, min_timestep=200)
        options |= dict(default_timesteps=FAST_TIMESTEPS, autocast_dtype="bfloat16")  # as training saves it
        pipe = SCRDiTPipeline(model, scheduler, processor, **options)
    else:
        scheduler = DDPMScheduler.from_config(default_scheduler("epsilon", "linear").config)
        pipe = SCRDiTPipeline(model, scheduler, processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_distilled_adapter(pipe: SCRDiTPipeline) -> None:
    """Do as after distillation: an adapter (untrained, as its weights do not matter for speed), fused, and TCD."""
    add_lora(pipe.transformer, 16, {})
    pipe.transformer.peft_config["default"].auto_mapping = {DISTILLED: "TCDScheduler"}
    pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config)
    pipe.fuse_lora(components=["transformer"])


def train_rate(preset: str, batch_size: int, repeats: int, args) -> tuple[float, float]:
    """Cells per second of an optimizer step, and achieved FLOP/s, of a new pipeline."""
    return time_training(make_pipeline(preset, args.device, torch.float32), batch_size, repeats, args)


def time_training(pipe: SCRDiTPipeline, batch_size: int, repeats: int, args) -> tuple[float, float]:
    """Cells per second of an optimizer step, and achieved FLOP/s (backward counted as two forward passes)."""
    model = pipe.transformer.train()
    flops = 3 * model.flops_per_cell() * batch_size
    batch = {
        "values": torch.randn(batch_size, NUM_GENES, device=args.device),
        "class_labels": torch.randint(NUM_LABELS, (batch_size, 1), device=args.device),
    }
    if model.count_head is not None:
        drawn = torch.from_numpy(make_counts(min(batch_size, 128))).to(args.device)
        batch["counts"] = drawn[torch.arange(batch_size, device=args.device) % len(drawn)]
    timesteps = torch.randint(200, 1000, (batch_size,), device=args.device)
    noise = torch.randn(batch_size, NUM_GENES, device=args.device)
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    if args.compile:
        model.compile()

    def step():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = diffusion_loss(model, noise_scheduler, batch, timesteps, noise).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    time_of_step = seconds(step, repeats, args.device)
    return batch_size / time_of_step, flops / time_of_step


def sample_rate(preset: str, batch_size: int, num_inference_steps: int | None, repeats: int, args) -> float:
    """Cells per second of a call of a new pipeline; `None` takes its number of network calls."""
    pipe = make_pipeline(preset, args.device, getattr(torch, args.dtype))
    if getattr(args, "distilled", 0):
        add_distilled_adapter(pipe)
    return time_sampling(pipe, batch_size, num_inference_steps, repeats, args)


def time_sampling(pipe: SCRDiTPipeline, batch_size: int, num_inference_steps: int | None, repeats: int, args) -> float:
    """Cells per second of a pipeline call; `None` takes the pipeline's number of network calls."""
    if args.compile:
        pipe.transformer.compile()

    def call():
        at_once = None if args.device == "cpu" else batch_size  # None: as many as by default
        pipe(batch_size, num_inference_steps=num_inference_steps, batch_size=at_once, output_type="np")

    return batch_size / seconds(call, repeats, args.device)


def matmul_rate(preset: str, batch_size: int, args) -> float:
    """FLOP/s of a plain matmul of the shape of a block's MLP: (B N, D) x (D, 4 D)."""
    config = fit_preset(preset, NUM_GENES)
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    rows = batch_size * -(-NUM_GENES // config["patch_size"])
    a = torch.randn(rows, dim, device=args.device, dtype=getattr(torch, args.dtype))
    b = torch.randn(dim, 4 * dim, device=args.device, dtype=getattr(torch, args.dtype))
    return 2 * rows * dim * 4 * dim / seconds(lambda: a @ b, 20, args.device)


@contextmanager
def start_side(root: Path, dtype: str, distilled: int, args) -> Iterator[subprocess.Popen]:
    """Start a process that measures the package and the benchmark in `root`."""
    new = root / Path(__file__).relative_to(ROOT)
    command = [sys.executable, str(Path(__file__).with_name("measuring.py"))]
    command += [str(new if new.exists() else root / OLD_PLACE), args.device, dtype, str(args.num_genes), str(distilled)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
    ) as process:
        yield process
        process.stdin.close()


def compare_with(commit: str, args) -> dict[str, dict[str, list[float]]]:
    """Rates of `commit` and of this checkout, turn by turn, in cells per second."""
    rates: dict = {task: {"before": [], "now": []} for task in ("training", "sampling")}
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", f"{folder}/before", commit], check=True)
        try:
            before = start_side(Path(folder) / "before", "float32", 0, args)
            with before as earlier, start_side(ROOT, args.dtype, args.distilled, args) as present:
                for _ in range(args.turns):
                    for task, found in rates.items():
                        for name, side in (("before", earlier), ("now", present)):
                            side.stdin.write(f"{task}\n")
                            side.stdin.flush()
                            found[name].append(float(side.stdout.readline()))
        finally:
            subprocess.run([*git, "remove", "--force", f"{folder}/before"], check=True)
    return rates


def report_ratios(rates: dict[str, dict[str, list[float]]], args) -> None:
    """Print and write rates and their ratios."""
    print(f"{args.num_genes} genes, {args.device}, {args.dtype} training, {torch.get_num_threads()} threads")
    print(f"{'cells per second':18}{'before':>10}{'now':>10}{'ratio: min':>14}{'median':>10}{'max':>10}")
    for task, found in rates.items():
        ratios = [now / before for before, now in zip(found["before"], found["now"], strict=True)]
        middle = [statistics.median(figures) for figures in (found["before"], found["now"], ratios)]
        print(f"{task:18}{middle[0]:10.1f}{middle[1]:10.1f}{min(ratios):14.2f}{middle[2]:10.2f}{max(ratios):10.2f}")
    save(
        {
            "against": args.against,
            "num_genes": args.num_genes,
            "dtype": args.dtype,
            "distilled": args.distilled,
            "rates": rates,
        },
        args.output,
    )


def save(results: dict, path: str) -> None:
    """Write results as JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2))
    print(f"Wrote {path}")


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="compile the transformer")
    parser.add_argument("--paper_steps_measured", type=int, default=10, help="DDPM steps to measure, of 1,000")
    parser.add_argument("--output", default="outputs/benchmark.json")
    parser.add_argument("--against", metavar="COMMIT", help="measure against this commit instead of the paper's model")
    parser.add_argument("--distilled", type=int, default=0, help="with --against: calls with a distilled adapter")
    parser.add_argument("--turns", type=int, default=7, help="with --against: how often each side is measured")
    parser.add_argument("--num_genes", type=int, default=NUM_GENES, help="with --against: genes of the model")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    if args.against:
        report_ratios(compare_with(args.against, args), args)
        return

    batch = 128 if args.device == "cpu" else 4096
    paper_batch = 16 if args.device == "cpu" else 512
    ours, ours_flops = train_rate(DEFAULT, batch, 40, args)
    paper, paper_flops = train_rate(PAPER, paper_batch, 10, args)
    ours_sampling = sample_rate(DEFAULT, 4 * batch, None, 6, args)
    partial = sample_rate(PAPER, 4 * paper_batch, args.paper_steps_measured, 6, args)
    paper_sampling = partial * args.paper_steps_measured / PAPER_STEPS
    results = {
        "machine": torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "dtype": args.dtype,
        "compile": args.compile,
        "training_cells_per_second": {DEFAULT: ours, PAPER: paper, "ratio": ours / paper},
        "sampling_cells_per_second": {
            f"{DEFAULT}, default": ours_sampling,
            f"{PAPER}, DDPM {PAPER_STEPS}": paper_sampling,
            "ratio": ours_sampling / paper_sampling,
        },
        "training_flops_over_matmul": {
            DEFAULT: ours_flops / matmul_rate(DEFAULT, batch, args),
            PAPER: paper_flops / matmul_rate(PAPER, paper_batch, args),
        },
        "training_gflops": {DEFAULT: ours_flops / 1e9, PAPER: paper_flops / 1e9},
    }
    print(f"{NUM_GENES} genes, {args.device}, {args.dtype}{', compiled' if args.compile else ''}")
    print(f"{'':34}{DEFAULT:>16}{PAPER:>18}{'ratio':>10}")
    print(f"{'training, cells per second':34}{ours:16.1f}{paper:18.2f}{ours / paper:10.1f}")
    ratio = ours_sampling / paper_sampling
    print(f"{'sampling, cells per second':34}{ours_sampling:16.1f}{paper_sampling:18.4f}{ratio:10.0f}")
    print(f"{'training, GFLOP/s':34}{ours_flops / 1e9:16.1f}{paper_flops / 1e9:18.1f}")
    over = results["training_flops_over_matmul"]
    print(f"{'... over a plain matmul':34}{over[DEFAULT]:16.2f}{over[PAPER]:18.2f}")
    save(results, args.output)


if __name__ == "__main__":
    main()
