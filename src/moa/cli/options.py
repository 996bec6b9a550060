"""What several commands share: options, and how their values are read."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moa.errors import InputError

out = Console()

Model = Annotated[str, typer.Argument(help="Hub id, local folder, GGUF file, or 'demo' (SmolLM2-135M-Instruct).")]
RunDir = Annotated[Path, typer.Option("--run-dir", help="Where the stages keep their results; a second call resumes.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The plan to write.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
DType = Annotated[str, typer.Option(help="auto (float32 on a CPU, else the checkpoint's), float32, bfloat16, float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Devices = Annotated[
    str, typer.Option("--device", help="As elsewhere; several with commas share the work, one named twice runs two.")
]
Lengths = Annotated[str | None, typer.Option(help="Profile lengths, e.g. 1024,2048 (default: by the context).")]
ValidationLength = Annotated[
    int | None, typer.Option(min=1, help="One more length of validation (default: 1.5 x the longest).")
]
Items = Annotated[int, typer.Option(help="Calibration items per length and source.")]
ValidationItems = Annotated[int, typer.Option(help="Held-out items per length and source.")]
Mixture = Annotated[
    str | None,
    typer.Option(help="Weights of calibration sources: retrieval, summary, text.", show_default="by density"),
]
MixtureNames = Annotated[
    str | None,
    typer.Option("--mixture", help="As of `moa search`; of these only the names count here.", show_default="all three"),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random choices.")]
TextFiles = Annotated[list[Path] | None, typer.Option("--text", help="Calibration text files (repeat the option).")]
Dataset = Annotated[str | None, typer.Option(help="Calibration text from an HF dataset: hub name or local path.")]
Density = Annotated[float, typer.Option(help="Stored KV over all KV, above 0 and at most 1.")]
Constrained = Annotated[str | None, typer.Option(help="More lengths at which the density must hold (default: twice).")]
RulesPerLayer = Annotated[int | None, typer.Option(help="At most so many rules in a layer (the paper: 2).")]
Grid = Annotated[str, typer.Option(help="Rules to choose from: scaled, paper, proportional, binary.")]
Points = Annotated[int, typer.Option(help="Cuts of each objective's range.")]
Refine = Annotated[
    int | None,
    typer.Option(
        "--refine",
        min=0,
        help="Plans to measure for a better one; 0 for none.",
        show_default="800 or more, half from density 0.5 on",
    ),
]
PlanFile = Annotated[Path, typer.Option("--plan", help="A plan file.")]

DEFAULT_RUN = Path("runs/search")


def numbers_of(text: str | None, option: str) -> tuple[int, ...] | None:
    """Positive whole numbers with commas, as given to ``option``; None for None. Raises InputError for what is none."""
    if text is None:
        return None
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise InputError(f"{option} {text!r}: expected positive whole numbers with commas, such as 1024,2048")
    return values


def weights_of(text: str | None) -> dict[str, float] | None:
    """Weights of calibration sources, from ``source=weight,...``; None for None. Raises InputError for what is none."""
    if text is None:
        return None
    try:
        weights = {name: float(weight) for name, weight in (part.split("=") for part in text.split(","))}
    except ValueError:
        weights = {}
    if not weights or not all(0 < weight < math.inf for weight in weights.values()):
        raise InputError(
            f"--mixture {text!r}: expected sources with weights above 0, such as retrieval=1,text=0.5,summary=0.5"
        )
    return weights


def plans_of(files: Sequence[Path] | None) -> dict[str, Any]:
    """The `moa.plan.Plan` of each file, by what tables call it: by the file's name, or by its path where others have
    that name."""
    from moa.plan import Plan

    found = files or ()
    named = Counter(path.stem for path in found)
    return {f"MoA {path.stem if named[path.stem] == 1 else path.with_suffix('')}": Plan.load(path) for path in found}


def calibration_text(files: list[Path] | None, dataset: str | None) -> Any:
    """The `moa.search.text.TextSource` that is asked for; Python's documentation by default."""
    from moa.search.text import default_text, text_from_dataset, text_from_files

    if files and dataset:
        raise InputError("--text and --dataset were both given; choose one")
    if files:
        return text_from_files(files)
    return text_from_dataset(dataset) if dataset else default_text()


def load(model: str, dtype: str, device: str, quiet: bool) -> Any:
    """The `moa.models.LoadedModel`."""
    from moa.models import load_model
    from moa.progress import Progress

    return load_model(model, dtype, device, Progress(quiet))


def open_run(folder: Path, quiet: bool) -> Any:
    """The `moa.search.run.Run` in a folder."""
    from moa.progress import Progress
    from moa.search.run import Run

    return Run(folder, Progress(quiet))


def densities_of(text: str) -> list[float]:
    """Densities with commas. Raises InputError for anything else, and for what is no density."""
    from moa.plan import check_density

    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--density {text!r}: expected numbers above 0 and up to 1, such as 0.5,0.25") from error
    for each in found:
        check_density(each)
    return found
