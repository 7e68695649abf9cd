"""The one command line, ``python -m samantics COMMAND``. A command imports what it needs when it runs: help is quick.

``extract`` and ``tune`` share their work between the processes of ``torchrun ... -m samantics COMMAND``.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from samantics.errors import StudyError

app = typer.Typer(
    help="Does SAM know what it segments? Runs the study and its parts.", no_args_is_help=True, add_completion=False,
    rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 0, or 1 after a fault that one line tells, or 2 for a wrong option."""
    try:
        app(arguments, prog_name="samantics")
    except SystemExit as end:
        return int(end.code or 0)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else " ".join(str(error).split())
        print(f"error: {what}: mend that and run again", file=sys.stderr)
    else:
        return 0
    return 1


def _script(name: str) -> Any:
    """A module of ``scripts/``: it lies beside the library, not in it."""
    folder = Path(__file__).parents[2] / "scripts"
    if not folder.is_dir():
        raise StudyError(f"{folder} is missing: run this command in a clone of the project")
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def _given(options: dict[str, Any], *others: str) -> dict[str, Any]:
    """Those of a command's options that were given, by name; not the others, which it takes itself."""
    return {name: value for name, value in options.items() if value is not None and name not in others}


# -------------------------------------------------------------------------------------------------------- the study


@app.command()
def run(
    more: Annotated[list[str] | None, Argument(hidden=True)] = None,  # the 03 of --only 01 03: options take one
    only: Annotated[list[str] | None, Option(help="These notebooks only, by number or name: --only 01 03")] = None,
    scale: Annotated[str, Option(help="pocket, lite or paper")] = "pocket",
    quick: Annotated[bool, Option("--quick", help="pocket from small samples: a first look")] = False,
    fresh: Annotated[bool, Option("--fresh", help="First empty this scale's caches")] = False,
    student: Annotated[bool, Option("--student", help="Only write notebooks without solutions")] = False,
    seed: Annotated[int | None, Option(help="Another seed than the notebooks' own")] = None,
    data: Annotated[Path | None, Option(help="Your images, a sub-folder for each class")] = None,
    references: Annotated[Path | None, Option(help="Your references: COCO JSON, or labelme or SA-1B files")] = None,
    targets: Annotated[Path | None, Option(help="Your target images: the same, or a folder of images")] = None,
    images: Annotated[Path | None, Option(help="The folder of the images that both name")] = None,
    target_images: Annotated[Path | None, Option(help="Notebook 05: that of the targets' images, if another")] = None,
    weights: Annotated[str | None, Option(help="Others than the scale's: zoo, official or random")] = None,
    shots: Annotated[int | None, Option(help="Notebook 05: references per class")] = None,
    min_area: Annotated[float | None, Option(help="Notebook 05: pixels that references exceed")] = None,
    min_score: Annotated[float | None, Option(help="Notebook 05: no instances below")] = None,
    skip_bad_images: Annotated[bool | None, Option("--skip-bad-images", help="Notebook 05: leave them out")] = None,
) -> None:
    """Run the notebooks; leave figures, tables and a report (./run_all.sh --help says more)."""
    given = _given(locals(), "more", "only", "scale", "quick", "fresh", "student")
    study, chosen = _script("study"), [*(only or ()), *(more or ())]
    if quick and scale not in ("pocket", "quick"):
        raise StudyError(f"--quick is a look at the pocket scale: leave it out, or --scale {scale}")
    scale = "quick" if quick else scale
    if student:
        print(f"notebooks for students: {study.write_student_notebooks(chosen)}")
        return
    try:
        outcomes = study.run_study(scale, chosen, fresh, given)
    except KeyboardInterrupt as stop:
        print("\nstopped; finished notebooks and caches are kept", file=sys.stderr)
        raise typer.Exit(130) from stop
    print(study.summary(outcomes))
    if any(outcome.error for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def compare(old: Path, new: Path) -> None:
    """Compare the tables of two runs; exit code 1 when numbers leave their tolerances or a verdict differs."""
    if not _script("compare").agree(old, new):
        raise typer.Exit(1)


# ------------------------------------------------------------------------------------------ parts that take their time


@app.command()
def extract(
    folder: Annotated[Path, Argument(help="Image folder: train/ and val/, or a sub-folder for each class")],
    encoder: str = "sam",
    weights: str = "zoo",
    layers: Annotated[list[str] | None, Option(help="LAYER:POOLING, repeatable (default: the headline)")] = None,
    batch_size: Annotated[int | None, Option(help="Images at once (default: by the size of the input)")] = None,
    workers: int = os.cpu_count() or 2,
    half: Annotated[bool, Option("--half", help="Compute in bfloat16")] = False,
) -> None:
    """Encode both splits of an image folder into the store of features."""
    import torch

    from samantics.data.folders import image_folders
    from samantics.models.encoder import load_encoder
    from samantics.probing.features import encode_images

    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    splits, model = image_folders(folder), load_encoder(encoder, weights, device, half=half)
    names = layers or [":".join(model.headline)]
    wanted = [(name.partition(":")[0], name.partition(":")[2] or "mean") for name in names]
    for split in splits:
        store = encode_images(model, split, wanted, split.hash, batch_size=batch_size, workers=workers)
        print(f"{store.folder}: {len(store.kept)} images, {len(store.skipped)} unreadable")


@app.command()
def tune(
    scale: str = "paper", references: str = "", targets: str = "", images: str = "", weights: str = "",
    epochs: Annotated[float | None, Option(help="Other than the scale's")] = None,
    batch: Annotated[int | None, Option(help="Images per step over all processes")] = None,
) -> None:  # fmt: skip
    """Tune the in-context model by itself, as notebook 02 does."""
    from samantics.incontext.study import tune as tune_model

    print(tune_model(scale, references, targets, images, weights, **_given({"epochs": epochs, "batch": batch})), end="")


# ---------------------------------------------------------------------------------------------------- the pocket zoo


@app.command()
def train(
    names: Annotated[list[str], Argument(help="Of mae, hiera, sam, sam2, clip, dinov2, supervised, sam_scratch")],
    out: Annotated[Path | None, Option(help="Folder of the results (default: where the zoo is loaded)")] = None,
    images: Annotated[int | None, Option(help="Pictures seen, counted with repetition")] = None,
    pool: Annotated[int | None, Option(help="Different pictures rendered")] = None,
    batch: Annotated[int | None, Option(help="Pictures per step")] = None,
    learning_rate: Annotated[float | None, Option(help="The highest")] = None,
    growth: Annotated[float | None, Option(help="Share of the training on smaller pictures")] = None,
    probe_points: Annotated[int | None, Option(help="Points of the curves")] = None,
    seed: int = 0,
) -> None:
    """Train models of the pocket zoo, parents first; killed? Run it again, without those that are finished."""
    given = _given(locals(), "names", "out")
    from samantics.zoo.training import Recipe, train_models

    train_models(names, Recipe(**given), **_given({"folder": out}))


@app.command()
def quality() -> None:
    """Measure the shipped zoo on test artists and write the table beside its weights."""
    from samantics.zoo.quality import write_quality

    print(write_quality().to_string(index=False))


# --------------------------------------------------------------------------- what comes with the project, made anew


@app.command()
def readme() -> None:
    """Write the tables of README.md from the committed pocket run."""
    _script("report").rewrite_readme()


@app.command()
def catalogue() -> None:
    """Make MojiWorld's catalogue of drawings and its instance classes from the installed packages."""
    print(*_script("curation").write_catalogue(), sep="\n")


@app.command()
def choose_naming() -> None:
    """Choose the weight of notebook 02's naming on validation scenes, with the zoo as it is: some minutes."""
    print(_script("choices").choose_naming().to_string(index=False))


@app.command()
def choose_filters() -> None:
    """Choose the filters of notebook 03's proposals on validation scenes, with the zoo as it is: about a minute."""
    print(_script("choices").choose_filters().to_string(index=False))
