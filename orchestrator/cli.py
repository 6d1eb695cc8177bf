"""The command `bigbatch`. Data go to stdout, words for people to stderr; what a user did wrong is one line, not a traceback."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.terminal import say, shown

app = typer.Typer(
    name="bigbatch",
    help="Large-batch training studies: one recipe, one publishable answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ROOT = str(Path(__file__).resolve().parents[1])  # of our packages
USAGE, FAILED, BUSY, INTERRUPTED = 2, 3, 75, 130

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe: .yaml, .yml or .json")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. base.epochs=2")
]
Output = Annotated[
    Path, typer.Option("--output", "-o", envvar="BIGBATCH_RUNS", help="the folder that holds all studies")
]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="let the recipe import your own network")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turns what a user can cause into one clear line and an exit code."""
    from cluster.tasks import ClusterError
    from orchestrator.files import Damaged
    from orchestrator.recipe import RecipeError
    from orchestrator.store import Busy
    from orchestrator.study import Changed
    from orchestrator.workloads import DataError
    from strategies.contract import PlanError

    try:
        yield
    except (RecipeError, DataError, PlanError, Damaged, ClusterError) as error:
        say(str(error))
        raise typer.Exit(USAGE) from None
    except Changed as error:
        say(f"the recipe differs from the one that this study began with:\n{error}")
        say(
            "give it another `study:` name, undo the change, or start afresh with --fresh (the old study is moved aside)"
        )
        raise typer.Exit(USAGE) from None
    except Busy as error:
        say(str(error))
        raise typer.Exit(BUSY) from None
    except OSError as error:  # no right to write, disk full, a file where a folder should be
        say(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
        raise typer.Exit(USAGE) from None


def open_study(path: Path, sets: list[str] | None, allow_code: bool, output: Path = Path("runs")) -> Any:
    from orchestrator.recipe import load
    from orchestrator.study import Study

    recipe = load(path, sets or (), allow_code=allow_code)
    import_also_from([os.getcwd()] if allow_code else [])
    return Study(recipe, path.read_text(encoding="utf-8"), output)


def check_plans(path: Path, sets: list[str] | None) -> None:
    """Raises RecipeError with every arm that cannot be, at its place."""
    from orchestrator.plan import impossible
    from orchestrator.recipe import RecipeError, cautions

    if problems := cautions(path, sets or (), impossible):
        raise RecipeError(problems)


def caution(path: Path, sets: list[str] | None) -> None:
    """Tells on stderr what the user should know of a sound recipe."""
    from orchestrator.fairness import unfair
    from orchestrator.recipe import cautions
    from orchestrator.recipe.checks import untested

    for problem in cautions(path, sets or (), lambda recipe: [*unfair(recipe), *untested(recipe)]):
        say(str(problem))


def import_also_from(folders: list[str]) -> None:
    """Modules in these folders are found by this process and by those that it starts. So are our own packages, also where
    the current folder holds folders of their names: an editable install alone would lose against those."""
    sys.path[:] = [*folders, *sys.path, ROOT]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (*folders, os.environ.get("PYTHONPATH"), ROOT)))


@app.command()
def run(
    recipe: RecipePath,
    set_: Sets = None,
    output: Output = Path("runs"),
    allow_code: AllowCode = False,
    wait: Annotated[bool, typer.Option("--wait", help="wait while another driver runs this study")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="move an earlier study of this name aside")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="end the study at the first failed trial")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="the same as `bigbatch plan`")] = False,
) -> None:
    """Run a study, or what is left of it: the same command again goes on where it was."""
    with plain_errors():
        study = open_study(recipe, set_, allow_code, output)
        caution(recipe, set_)
        if dry_run:
            return print_plan(study, False)
        from orchestrator.driver import drive

        raise typer.Exit(drive(study, wait=wait, fresh=fresh, fail_fast=fail_fast))


@app.command()
def validate(recipe: RecipePath, set_: Sets = None, allow_code: AllowCode = False) -> None:
    """Check a recipe: all its errors at once, each with its place."""
    with plain_errors():
        from orchestrator.recipe.resolve import size

        study = open_study(recipe, set_, allow_code)
        caution(recipe, set_)
        check_plans(recipe, set_)
        say(f"{recipe}: ok, {size(study.recipe)} trials")


@app.command()
def plan(
    recipe: RecipePath,
    set_: Sets = None,
    output: Output = Path("runs"),
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """What a run would do: trials, batch arithmetic, phases, needs against offers, what is done already."""
    with plain_errors():
        study = open_study(recipe, set_, allow_code, output)
        caution(recipe, set_)
        print_plan(study, as_json)


def print_plan(study: Any, as_json: bool) -> None:
    from orchestrator.plan import as_data, as_text

    data = as_data(study)
    print(json.dumps(data, indent=1) if as_json else as_text(data))


@app.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="STUDY|RECIPE", help="a study directory, or a recipe")],
    set_: Sets = None,
    as_json: AsJson = False,
    resolved: Annotated[bool, typer.Option("--resolved", help="a recipe with every default filled in")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Results of a study directory, or a recipe as it is understood."""
    with plain_errors():
        if path.is_dir():
            return show_results(path, as_json)
        from orchestrator.recipe import dump, load
        from orchestrator.recipe import resolved as resolve

        recipe = load(path, set_ or (), allow_code=allow_code)
        if not (resolved or as_json):
            return print(shown(path.read_text(encoding="utf-8")), end="")
        data = resolve(recipe)
        print(json.dumps(data, indent=1) if as_json else dump(data), end="\n" if as_json else "")


def show_results(path: Path, as_json: bool) -> None:
    from orchestrator.progress import result_line
    from orchestrator.store import Store

    results = Store(path).results()
    if not results and not (path / "journal.jsonl").exists():
        say(f"{path}: not a study directory (no journal.jsonl)")
        raise typer.Exit(USAGE)
    if as_json:
        print(json.dumps(results, indent=1))
        return
    for result in results:
        print(f"{result['trial']}  {result['status']:9} {result_line(result)}")


@app.command()
def status(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="a study directory")],
    watch: Annotated[bool, typer.Option("--watch", "-w", help="go on until the study ends")] = False,
    as_json: AsJson = False,
) -> None:
    """How far a study has come, from any terminal."""
    from orchestrator.progress import show_status

    raise typer.Exit(show_status(study, watch, as_json))


@app.command()
def report(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="a study directory")],
    features: Annotated[
        str | None,
        typer.Option(metavar="TRIAL[:STAGE]", help="also look at what a trial's stages make of the test images: t-SNE"),
    ] = None,
) -> None:
    """Build report.html, report.md, results.csv, results.parquet and the figures again."""
    from orchestrator.report import build
    from orchestrator.store import Store

    if not (study / "trials").is_dir():
        say(f"{study}: not a study directory (no trials/)")
        raise typer.Exit(USAGE)
    with plain_errors():
        if features:
            from orchestrator.report.stage_features import measure

            measure(study, features)
        for line in build(study, Store(study).trial_ids()):
            say(line)
        print(study / "report.html")


@app.command()
def gc(
    runs: Annotated[
        Path, typer.Argument(metavar="RUNS", envvar="BIGBATCH_RUNS", help="the folder that holds all studies")
    ] = Path("runs"),
    delete: Annotated[bool, typer.Option("--delete", help="delete them; else they are told only")] = False,
) -> None:
    """Finished phases and kept features that no study of the folder refers to: what they are, and how many bytes."""
    with plain_errors():
        from orchestrator.garbage import as_text, collect

        print(as_text(collect(runs, delete), runs, delete))


@app.command()
def schema() -> None:
    """The JSON Schema of recipes, for editors and other tools."""
    from orchestrator.recipe import json_schema

    print(json.dumps(json_schema(), indent=1))


@app.command()
def strategies() -> None:
    """The training methods that a recipe can name, with their options."""
    from dataclasses import fields

    from strategies import CATALOGUE

    for name, kind in sorted(CATALOGUE.items()):
        module = sys.modules[kind.__module__]
        print(f"{name}: {(module.__doc__ or '').strip().splitlines()[0]}")
        for f in fields(kind):
            print(f"    {f.name} = {f.default}    {f.metadata['doc']}")


@app.command()
def workloads() -> None:
    """The data sets and models that a recipe can name."""
    from orchestrator.recipe.workload_schema import Data, Network

    for title, choice in (("data", Data), ("model", Network)):
        for name, f in choice.model_fields.items():
            print(f"{title}: {f.alias or name}" + (f"    {f.description}" if f.description else ""))


@app.command()
def init(
    target: Annotated[Path, typer.Argument(help="the recipe file to write")] = Path("recipe.yaml"),
    name: Annotated[str, typer.Option("--from", help="the shipped recipe to start from")] = "quickstart",
) -> None:
    """Write a recipe to start from."""
    folder = Path(ROOT) / "recipes"
    shipped = sorted(folder.glob("*.yaml"))
    source = next((p for p in shipped if p.stem == name), None)
    if source is None or target.exists():
        what = f"{target} exists: it is left as it is" if source else f"no recipe {name!r}"
        say(f"{what}; shipped recipes: {', '.join(p.stem for p in shipped)}")
        raise typer.Exit(USAGE)
    with plain_errors():
        target.write_text(source.read_text().replace("./recipe.schema.json", str(folder / "recipe.schema.json"), 1))
    say(f"wrote {target}; next: bigbatch validate {target}")


@app.command()
def fit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a table: .json, .csv, or a study directory")],
    as_json: AsJson = False,
) -> None:
    """Fit the law of the critical batch size to a table of batch sizes and steps or examples to target."""
    with plain_errors():
        from orchestrator.batch_law.curve import as_data, as_text
        from orchestrator.batch_law.table import read

        data = [as_data(curve) for curve in read(file)]
        print(json.dumps(data, indent=1) if as_json else as_text(data))


@app.command()
def submit(
    recipe: RecipePath,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", metavar="URL", help="the Ray dashboard, http://HOST:8265")
    ],
    wait: Annotated[bool, typer.Option("--wait", help="follow the log, and end with the study's exit code")] = False,
    set_: Sets = None,
    working_dir: Annotated[Path, typer.Option(metavar="DIR", help="the folder that goes to the cluster")] = Path("."),
    output: Annotated[str, typer.Option("--output", "-o", help="the cluster's folder of studies")] = "~/bigbatch/runs",
    allow_code: AllowCode = False,
) -> None:
    """Run a study as a job of a Ray cluster."""
    with plain_errors():
        from orchestrator.submit import submit as send

        study = open_study(recipe, set_, allow_code)
        caution(recipe, set_)
        check_plans(recipe, set_)
        options = [f"--set={setting}" for setting in set_ or ()] + ["--allow-code"] * allow_code
        raise typer.Exit(send(study.recipe, recipe, address, working_dir, output, options, wait))


@app.command()
def doctor(
    output: Output = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Check this machine and its settings: what is wrong, and what to do about it."""
    from orchestrator.doctor import BAD, as_text, diagnose

    findings = diagnose(output)
    print(json.dumps([asdict(f) for f in findings], indent=1) if as_json else as_text(findings))
    raise typer.Exit(FAILED if any(f.status == BAD for f in findings) else 0)


@app.command()
def predict(
    studies: Annotated[list[Path], typer.Argument(metavar="STUDY...", help="study directories of one workload")],
    workers: Annotated[str, typer.Option(metavar="N,N,...", help="numbers of workers, e.g. 8,64,1024")],
    arm: Annotated[str | None, typer.Option(help="one arm; all, if it is left out")] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="batch sizes; those measured and up to 16 times as many")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(metavar="FILE|PRESET", help="loopback, ethernet_10g (default), ethernet_100g, nvlink_infiniband"),
    ] = None,
    as_json: AsJson = False,
    force: Annotated[bool, typer.Option("--force", help="predict beyond 16 times the largest batch size")] = False,
) -> None:
    """Time and cost to target on more workers and at larger batch sizes, with intervals and what they rest on."""
    with plain_errors():
        from orchestrator.predict.command import predict as forecasts
        from orchestrator.predict.output import as_data, as_text

        found, refusals = forecasts(studies, workers, arm, batch, hardware, force)
        for refusal in refusals:
            say(refusal)
        print(json.dumps([as_data(f) for f in found], indent=1) if as_json else "\n\n\n".join(map(as_text, found)))
