"""From a recipe file to a checked `Recipe`, or to every mistake in it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from orchestrator.recipe import overrides as override
from orchestrator.recipe.checks import check
from orchestrator.recipe.messages import Finding, findings
from orchestrator.recipe.problems import Path, Problem, RecipeError
from orchestrator.recipe.study_schema import Recipe
from orchestrator.recipe.yaml_nodes import MAX_BYTES, Document, read


def load(path: str | PathLike[str], overrides: Sequence[str] = (), allow_code: bool = False) -> Recipe:
    """The recipe in a .yaml, .yml or .json file, with `dotted.path=YAML value` overrides applied in turn.

    Raises RecipeError for whatever is wrong with the file, the overrides or the recipe. A recipe that names code to
    import is refused unless `allow_code`.
    """
    return loads(_bytes(path), str(path), overrides, allow_code)


def loads(text: str | bytes, file: str, overrides: Sequence[str] = (), allow_code: bool = False) -> Recipe:
    """As `load`, for text that is at hand; `file` is its name in messages."""
    return _checked(text, file, overrides, allow_code)[0]


def cautions(
    path: str | PathLike[str], overrides: Sequence[str], judge: Callable[[Recipe], Iterable[Finding]]
) -> list[Problem]:
    """What `judge` finds in a recipe that can be used, each finding with its place. Raises RecipeError if it cannot."""
    recipe, document = _checked(_bytes(path), str(path), overrides, allow_code=True)
    return _problems(judge(recipe), document)


def _checked(text: str | bytes, file: str, overrides: Sequence[str], allow_code: bool) -> tuple[Recipe, Document]:
    document = read(text, file)
    if document.problems and document.data is None:
        raise RecipeError(document.problems)
    if not isinstance(document.data, dict):
        raise RecipeError([Problem(file, 1, 1, "", "expected a map of recipe keys, such as study, workload, base")])
    for text_of_one in overrides:
        override.apply(document, text_of_one, Recipe)
    recipe = _validated(document)
    semantic = [*_code(recipe, allow_code), *check(recipe)]
    if semantic:
        raise RecipeError(_problems(semantic, document))
    return recipe, document


def validate_structure(data: Any) -> list[ErrorDetails]:
    """What the schema alone says against plain data. The JSON Schema agrees on whether there is anything to say."""
    try:
        Recipe.model_validate(data)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


def _bytes(path: str | PathLike[str]) -> bytes:
    """The file's content, or as much of it as shows that it is too long."""
    try:
        with FilePath(path).open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except IsADirectoryError:
        reason = "a directory, expected a recipe file"
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    raise RecipeError([Problem(str(path), None, None, "", reason)])


def _validated(document: Document) -> Recipe:
    errors = validate_structure(document.data)
    told = {(p.line, p.column) for p in document.problems if p.line}  # what could not be read is not checked as well
    fresh = _problems(findings(errors, document.data, Recipe), document)
    problems = document.problems + [p for p in fresh if (p.line, p.column) not in told]
    if problems:
        raise RecipeError(problems)
    return Recipe.model_validate(document.data)


def _problems(found: Iterable[Finding], document: Document) -> list[Problem]:
    return [Problem.at(document.place(f.path, f.of_key), f.path, f.message) for f in found]


def _code(recipe: Recipe, allowed: bool) -> Iterator[Finding]:
    stated = recipe.model_dump(by_alias=True, exclude_unset=True)
    for path in () if allowed else _imports(stated):
        yield Finding(path, "names code to import, which can do anything: pass --allow-code if you trust the recipe")


def _imports(data: Any, path: Path = ()) -> Iterator[Path]:
    """Where the plain data of a recipe name a function to import."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        if key == "import" or str(key).endswith(".import"):
            yield (*path, key)
        yield from _imports(value, (*path, key))
