"""The command line: one command per stage, ``ccmdist STAGE FILE.yaml ... key=value ... [--dry-run]``, later wins.

Imports no torch, so help and dry runs answer at once. Problems that the user can mend are one message without a
traceback; the exit code is 0 done, 75 committed but not finished (run the same command again), 78 refused, 70 an
error of ours.
"""

import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ccmdist.commit import commit_json
from ccmdist.config.data import FolderShardsConfig, FoldShardsConfig, PhantomShardsConfig, PrecomputeConfig
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import digest, load, parted, resolved
from ccmdist.config.select import SelectConfig
from ccmdist.config.settings import Settings
from ccmdist.config.stages import STAGES
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.config.train import TrainConfig
from ccmdist.console import start_logging
from ccmdist.errors import ConfigError
from ccmdist.exits import code_of

SETTINGS: dict[str, Any] = {
    "rich_markup_mode": None,
    "add_completion": False,
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
}


def example(command: str) -> str:
    """How a help text ends: a command to copy, whose line is not broken at the terminal's width."""
    return f"\b\nExample: {command}"


app = typer.Typer(
    help="Fine-tune image editing models on corneal confocal microscopy, on a cluster or on a laptop.",
    epilog=example("ccmdist demo --out runs/demo"),
    **SETTINGS,
)
shards = typer.Typer(
    help="Make and check shard sets: images, nerve masks and prompts in WebDataset tars.",
    epilog=example("ccmdist shards phantom out=shards/phantom"),
    **SETTINGS,
)
model = typer.Typer(
    help="Make model folders that need no download, and plan what a training run needs.",
    epilog=example("ccmdist model make --size tiny --fitted --out models/tiny"),
    **SETTINGS,
)
adapter = typer.Typer(
    help="Export, merge, verify and show trained adapters.",
    epilog=example("ccmdist adapter show runs/tiny"),
    **SETTINGS,
)
job = typer.Typer(
    help="What the batch scripts in slurm/ and launch/ call before they start any task.",
    epilog=example("ccmdist job snapshot train configs/train/tiny.yaml run=runs/tiny"),
    **SETTINGS,
)
app.add_typer(shards, name="shards")
app.add_typer(model, name="model")
app.add_typer(adapter, name="adapter")
app.add_typer(job, name="job")

Arguments = Annotated[list[str] | None, typer.Argument(metavar="FILE.yaml|key=value", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the resolved settings and the plan, and do nothing.")]


def _load(kind: type[Settings], arguments: list[str] | None) -> Any:
    return load(kind, *parted(arguments or []))


def _stage(
    kind: type[Settings], module: str, arguments: list[str] | None, dry_run: bool, function: str = "run"
) -> None:
    """Read the settings of a stage and hand them to its job, or show them."""
    config = _load(kind, arguments)
    job = f"ccmdist.jobs.{module}"
    if dry_run:
        _show(config, getattr(importlib.import_module(job), "describe", None))
        return
    with tempfile.TemporaryDirectory(prefix="ccmdist-") as folder:
        path = Path(folder) / "config.json"
        commit_json(path, resolved(config))
        getattr(importlib.import_module(job), function)(str(path))


def _show(config: Settings, describe: Callable[[Any], str] | None) -> None:
    print(json.dumps(resolved(config), indent=2))
    print(f"digest {digest(config)}")
    if describe is not None:
        print(describe(config))
    print("dry run: nothing was done")


@shards.command(epilog=example("ccmdist shards phantom out=shards/phantom subjects_per_group=8 size_px=384"))
def phantom(arguments: Arguments = None, dry_run: DryRun = False) -> None:
    """Make procedural image, mask and prompt triples for every clinical group."""
    _stage(PhantomShardsConfig, "shards", arguments, dry_run, "phantom")


@shards.command(epilog=example("ccmdist shards folders source=my_frames out=shards/ccm test_fraction=0.2"))
def folders(arguments: Arguments = None, dry_run: DryRun = False) -> None:
    """Pack a folder of images, masks and a table.csv, as shards/README.md describes."""
    _stage(FolderShardsConfig, "shards", arguments, dry_run, "folders")


@shards.command(epilog=example("ccmdist shards fold source=shards/ccm out=shards/ccm-fold-0 fold=0 num_folds=5"))
def fold(arguments: Arguments = None, dry_run: DryRun = False) -> None:
    """Split a set anew by subject for one fold, so that a generator can be trained that never saw whom it tests."""
    _stage(FoldShardsConfig, "shards", arguments, dry_run, "fold")


@shards.command(epilog=example("ccmdist shards verify shards/phantom"))
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a shard set.")],
    plan: Annotated[bool, typer.Option("--plan", help="Also compare a synthetic set with its plan.")] = False,
    source: Annotated[
        Path | None, typer.Option("--source", help="With --plan: the set it was drawn from, to compare with it too.")
    ] = None,
) -> None:
    """Check every shard against the manifest, and a synthetic set against its plan: no gap, no duplicate.

    Against its source too: the masks and, where holes were filled, every byte outside of them.
    """
    if source and not plan:
        raise ConfigError("--source: is compared along with the plan", "add --plan")
    importlib.import_module("ccmdist.jobs.shards").verify(folder)
    if plan:
        importlib.import_module("ccmdist.jobs.synthesize").verify(folder, source)


@app.command(epilog=example("ccmdist precompute configs/precompute/tiny.yaml"))
def precompute(arguments: Arguments = None, dry_run: DryRun = False) -> None:
    """Encode masks, prompts and images once, into the cache that training and synthesis read."""
    _stage(PrecomputeConfig, "precompute", arguments, dry_run)


AllowChange = Annotated[
    list[str] | None,
    typer.Option("--allow-change", help="Setting that may differ from the run's first start; repeatable."),
]


@app.command(epilog=example("ccmdist train configs/train/tiny.yaml processes=2 num_steps=40"))
def train(arguments: Arguments = None, dry_run: DryRun = False, allow_change: AllowChange = None) -> None:
    """Fine-tune an adapter, or train a network from scratch. Run the same command again to resume after a stop."""
    config = _load(TrainConfig, arguments)
    job = importlib.import_module("ccmdist.jobs.train")
    if dry_run:
        _show(config, job.describe)
        return
    raise typer.Exit(job.start(config, frozenset(allow_change or ())))


@app.command(epilog=example("ccmdist synthesize configs/synthesize/completion.yaml adapter=runs/dual_lora"))
def synthesize(
    arguments: Arguments = None,
    objective: Annotated[
        str, typer.Option("--objective", help="synthesis, completion or both; as objective=... does.")
    ] = "",
    dry_run: DryRun = False,
) -> None:
    """Draw images for the masks of a shard set, into shards of the same format.

    `--objective completion` repairs frames instead: it fills holes (data.holes, or those that frames bring with them),
    and outside of its hole an image keeps every byte of its frame.
    """
    words = [*(arguments or []), *([f"objective={objective}"] if objective else [])]
    _stage(SynthesizeConfig, "synthesize", words, dry_run)


@app.command(epilog=example("ccmdist evaluate configs/evaluate/tiny.yaml"))
def evaluate(arguments: Arguments = None, dry_run: DryRun = False) -> None:
    """Compare synthetic sets with a real one: report.json and report.html."""
    _stage(EvaluateConfig, "evaluate", arguments, dry_run)


@app.command(epilog=example("ccmdist select configs/select/tiny.yaml run=runs/tiny metric=cnfl_bias"))
def select(arguments: Arguments = None, dry_run: DryRun = False) -> None:
    """Draw held-out masks with every checkpoint of a run, and point at the best: RUN/best.json.

    Afterwards `ccmdist synthesize ... adapter=RUN/best.json` (network= for a baseline) and `ccmdist adapter export
    RUN/best.json ...` use that one; RUN alone still means the newest. Metrics: cnfl_agreement, cnfl_bias,
    cnfl_equivalence, cldice. A run keeps the newest three checkpoints: train with checkpoint.keep=20 to have more to
    choose from. Nothing is deleted, and retention never removes the chosen one.
    """
    _stage(SelectConfig, "select", arguments, dry_run)


Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]


@app.command(epilog=example("ccmdist release synthetic/tiny --report reports/tiny --out releases/tiny --dry-run"))
def release(
    folder: Annotated[Path, typer.Argument(metavar="SET", help="Folder of a synthetic set.")],
    report: Annotated[Path, typer.Option("--report", help="Folder of the report that judged it.")],
    out: Out,
    licence: Annotated[str, typer.Option("--licence", help="Its name, such as CC-BY-NC-4.0; else left open.")] = "",
    dry_run: DryRun = False,
) -> None:
    """Write a synthetic set that passed the gate, with a data card that names nobody; refuse any other."""
    importlib.import_module("ccmdist.jobs.release").release(folder, report, out, licence, dry_run)


Size = Annotated[str, typer.Option("--size", help="tiny, small, full-width-2-blocks or full.")]
Version = Annotated[str | None, typer.Option("--version", help="Of qwen: v1, 2509 (the default) or 2511.")]
Model = Annotated[Path, typer.Option("--model", help="Folder of the base model.")]


@model.command(epilog=example("ccmdist model make --size tiny --fitted --out models/tiny"))
def make(
    out: Out,
    size: Size = "tiny",
    version: Version = None,
    seed: int = 0,
    fitted: Annotated[
        bool, typer.Option("--fitted", help="Use the small fitted weights that come along (tiny).")
    ] = False,
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            help="qwen (all sizes); in tiny flux, flux_control, kandinsky5; to diagnose with, mllama, qwen2_5_vl.",
        ),
    ] = "qwen",
) -> None:
    """Write a complete checkpoint folder with random weights, in the layout of a real download."""
    importlib.import_module("ccmdist.jobs.model").make(size, version, out, seed, fitted, kind)


@model.command(epilog=example("ccmdist model fit --out models/tiny-fit"))
def fit(
    out: Out,
    seed: int = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only, to see that it runs.")] = False,
) -> None:
    """Train the tiny VAE and MMDiT on phantoms until they can show an image; what `model make --fitted` uses."""
    importlib.import_module("ccmdist.jobs.model").fit(out, seed, quick)


@model.command(epilog=example("ccmdist model convert models/Qwen-Image-Edit-2509 --out models/2509-384px"))
def convert(
    model_folder: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of the model.")],
    out: Out,
    image_size_px: Annotated[int, typer.Option("--image-size-px", help="data.image_size_px of the runs.")] = 384,
    denoise_steps: Annotated[
        list[int], typer.Option("--denoise-steps", help="Of synthesis and of monitor; repeatable.")
    ] = [40, 8],  # noqa: B006
    dtype: Annotated[str, typer.Option("--dtype", help="bf16 or fp32.")] = "bf16",
    micro_batch_size: Annotated[int, typer.Option("--micro-batch-size", min=1, help="Matters in fp32 only.")] = 1,
) -> None:
    """Write the model with a table of its modulation, which new nodes then need neither read nor make: links and 2 GB.

    Adapters trained on one folder fit the other. Runs with other noise levels make their own table, as without it.
    """
    job = importlib.import_module("ccmdist.jobs.model")
    job.convert(model_folder, out, image_size_px, denoise_steps, dtype, micro_batch_size)


@model.command("plan", epilog=example("ccmdist model plan configs/train/wdlora.yaml --gpu h100"))
def plan_training(
    arguments: Arguments = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, max=4096, help="That train together.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option("--gpus-per-node", min=1, max=64, help="Of a node.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Their kind, such as h100, h200, a100, l40s.")] = None,
    fabric: Annotated[
        str | None, typer.Option("--fabric", help="Between them, such as nvlink-8x400g, nvlink-2x200g, pcie-1x200g.")
    ] = None,
    time_limit_min: Annotated[
        int | None, typer.Option("--time-limit-min", min=1, help="Of one job; else that of the section slurm.")
    ] = None,
    efficiency: Annotated[
        float | None, typer.Option("--efficiency", min=0.01, max=1, help="Of the GPU's peak; else as planned with.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Show instead how it scales to 8, 64 and 512 GPUs.")
    ] = False,
) -> None:
    """Predict memory, time and traffic of a training run, and the mode it should use, before a GPU-hour is spent.

    Settings are those of `ccmdist train`; a section slurm may say nodes, gpus_per_node, gpu_type and time_limit_min.
    """
    asked: dict[str, Any] = {"gpus": gpus, "gpus_per_node": gpus_per_node, "gpu": gpu, "fabric": fabric}
    asked |= {"time_limit_min": time_limit_min, "efficiency": efficiency}
    importlib.import_module("ccmdist.jobs.model_plan").show(arguments or [], asked, as_json, scaling)


Source = Annotated[
    Path, typer.Argument(help="Folder of an adapter, a run or a checkpoint; or RUN/best.json, which `select` wrote.")
]
Name = Annotated[
    str | None,
    typer.Option("--name", help="synthesis or completion, where a run of objective dual has trained both."),
]


@adapter.command(epilog=example("ccmdist adapter export runs/tiny --model models/tiny --out adapters/tiny"))
def export(source: Source, model_folder: Model, out: Out, name: Name = None) -> None:
    """Write the adapter for diffusers and for ComfyUI, with a model card, and verify what was written."""
    importlib.import_module("ccmdist.jobs.adapter").export(source, model_folder, out, name)


@adapter.command(epilog=example("ccmdist adapter merge runs/tiny --model models/tiny --out models/tiny-merged"))
def merge(source: Source, model_folder: Model, out: Out, name: Name = None) -> None:
    """Write a transformer folder with the adapter merged into its weights."""
    importlib.import_module("ccmdist.jobs.adapter").merge(source, model_folder, out, name)


@adapter.command("verify", epilog=example("ccmdist adapter verify adapters/tiny --model models/tiny"))
def verify_adapter(source: Source, model_folder: Model, name: Name = None) -> None:
    """Load the adapter with stock diffusers and compare its output with ours."""
    importlib.import_module("ccmdist.jobs.adapter").verify(source, model_folder, name)


@adapter.command(epilog=example("ccmdist adapter show runs/tiny_dual --name completion"))
def show(source: Source, name: Name = None) -> None:
    """Print what an adapter adapts, how large it is, the ranks it has grown to and how far it has moved."""
    importlib.import_module("ccmdist.jobs.adapter_show").show(source, name)


Stage = Annotated[str, typer.Argument(metavar="STAGE", help=", ".join(STAGES))]


@job.command(epilog=example("ccmdist job snapshot train configs/train/tiny.yaml run=runs/tiny"))
def snapshot(stage: Stage, arguments: Arguments = None) -> None:
    """Freeze the code and the settings of a stage; print the folder. A requeued job finds the one it has."""
    if stage not in STAGES:
        raise ConfigError(f"there is no stage {stage!r}", f"choose one of {', '.join(STAGES)}")
    config = _load(STAGES[stage], arguments)
    print(importlib.import_module("ccmdist.jobs.job").snapshot(stage, config, arguments or []))


@job.command(epilog=example("ccmdist job begin runs/tiny/jobs/1234"))
def begin(folder: Annotated[Path, typer.Argument(help="Folder that `ccmdist job snapshot` printed.")]) -> None:
    """Count a start of the job; refuse (78) when the last three have brought nothing new."""
    importlib.import_module("ccmdist.jobs.job").begin(folder)


@app.command(epilog=example("ccmdist status runs/tiny --watch"))
def status(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of a synthetic set while it is drawn.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew until it is done, refused, or ctrl-C.")] = False,
) -> None:
    """Tell where a run stands: state, step, time left, goodput, attempts, last checkpoint, why it last ended."""
    importlib.import_module("ccmdist.diagnostics.status").show(run, as_json, watch)


@app.command(epilog=example("ccmdist doctor configs/train/wdlora.yaml --require gpu,slurm"))
def doctor(
    arguments: Arguments = None,
    require: Annotated[str, typer.Option("--require", help="Comma-separated: gpu, slurm, flash, quant, ranks.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check machine, cluster and file system, with a remedy for each finding.

    Settings are those of `ccmdist train`; they say which model, shards, cache and run matter. Inside a job of several
    nodes it also tries what lies between them. WARN: works, but. MISS: something that --require, the settings or
    ccmdist itself needs is absent or broken; then the exit code is 78, else 0.
    """
    raise typer.Exit(importlib.import_module("ccmdist.diagnostics.doctor").run(arguments or [], require, as_json))


@app.command(epilog=example("ccmdist demo --out runs/demo"))
def demo(
    out: Out = Path("runs/demo"),
    slurm: Annotated[bool, typer.Option("--slurm", help="As jobs on a Slurm of its own; needs root.")] = False,
) -> None:
    """Run the whole chain on this machine: phantoms, training that is preempted and resumed, synthesis, report."""
    importlib.import_module("ccmdist.jobs.slurm_demo" if slurm else "ccmdist.jobs.demo").run(out)


def main() -> None:
    """Run the command of this process and exit with the contract's code."""
    start_logging()
    sys.exit(exit_code(sys.argv[1:]))


def exit_code(arguments: list[str], command: typer.Typer = app, name: str = "ccmdist") -> int:
    """Run one command; its exit code. What the user can mend is told in one message.

    Args:
        arguments: What follows the name.
        command: This command line, or a script's own.
        name: As the user typed it, for help texts.
    """
    run = typer.main.get_command(command).main
    return code_of(lambda: run(arguments, prog_name=name, standalone_mode=False))
