"""YAML or JSON text -> plain data and the place of every key and value. Nothing in a recipe can run or swell.

Reads parser events, so that no constructor exists for a tag to reach and every limit holds before memory is spent.
Plain words are read as in YAML 1.2: `1e-3` is a number, `010` is ten, `yes` is text, and no text is a date.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from orchestrator.recipe.problems import Path, Place, Problem, short

MAX_BYTES, MAX_VALUES, MAX_DEPTH, MAX_ALIASES = 1 << 20, 10_000, 32, 100
WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
INTEGER = re.compile(r"[-+]?[0-9]{1,300}")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
TAB = re.compile(r"^ *\t[ \t]*(?=[^\s#])", re.MULTILINE)


def scalar(text: str) -> Any:
    """What an unquoted word stands for; infinite or not-a-number values come back as such floats."""
    if text in WORDS:
        return WORDS[text]
    if NOT_FINITE.fullmatch(text):
        return math.nan
    if INTEGER.fullmatch(text):
        return int(text)
    return float(text) if NUMBER.fullmatch(text) else text


@dataclass
class Document:
    """Plain data, and where each part of it was written."""

    data: Any = None
    keys: dict[Path, Place] = field(default_factory=dict)
    values: dict[Path, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: Path, of_key: bool = False) -> Place:
        """Where `path` was written, or the nearest thing around it that was."""
        if of_key and path in self.keys:
            return self.keys[path]
        while path not in self.values:
            path = path[:-1]
        return self.values[path]


def read(source: str | bytes, file: str) -> Document:
    """The only document of `source`. Problems are in the result; with a syntax error they are all that is in it."""
    start = Place(file, 1, 1)
    reader = _Reader(file)
    raw = source.encode("utf-8", "surrogatepass") if isinstance(source, str) else source
    try:
        reader.limit(len(raw) <= MAX_BYTES, start, f"more than {MAX_BYTES >> 20} MiB, too long for a recipe")
        text = raw.decode("utf-8-sig")
        if file.endswith(".json"):
            text = text.replace("\t", " ")  # a tab is white space in JSON, and never part of a string
        reader.tabs(text)
        reader.events(text)
        return reader.document()
    except UnicodeDecodeError as error:
        reader.complain(start, (), f"not UTF-8 text, at byte {error.start}")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(file, mark.line + 1, mark.column + 1) if mark else start
        reader.complain(place, (), _syntax(error))
    except yaml.YAMLError as error:
        reader.complain(start, (), f"not readable as text: {short(str(getattr(error, 'reason', error)))}")
    except _Unusable:
        pass
    return Document(None, {}, {(): start}, reader.problems)


def _syntax(error: yaml.MarkedYAMLError) -> str:
    parts = (part for part in (error.problem, error.context) if part)
    return f"not YAML: {short(', '.join(parts))}"


class _Unusable(Exception):
    """Reading cannot go on."""


@dataclass(slots=True)
class _Node:
    place: Place
    content: Any  # a scalar, a list of nodes, or a list of (key node, value node)
    is_map: bool = False
    is_list: bool = False


class _Reader:
    """Builds nodes from events, then data from nodes. Aliases can make the data larger, so both are counted."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.anchors: dict[str, _Node] = {}
        self.aliases = 0
        self.count = 0
        self.root: _Node | None = None
        self.result = Document(problems=self.problems)

    def complain(self, place: Place, path: Path, message: str) -> None:
        self.problems.append(Problem.at(place, path, message))

    def limit(self, holds: bool, place: Place, message: str) -> None:
        if not holds:
            self.complain(place, (), message)
            raise _Unusable

    def tabs(self, text: str) -> None:
        for match in list(TAB.finditer(text))[:20]:
            place = Place(self.file, text.count("\n", 0, match.start()) + 1, match.group().index("\t") + 1)
            self.complain(place, (), "tab in the indentation, use spaces")
        if self.problems:
            raise _Unusable

    # -------------------------------------------------------------------------------------------- events -> nodes

    def events(self, text: str) -> None:
        stack: list[tuple[Any, list[_Node]]] = []  # the start of each open collection, and what is in it so far
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                self.limit(len(stack) < MAX_DEPTH, self.at(event), f"more than {MAX_DEPTH} levels deep")
                self.check_tag(event)
                self.anchors.pop(event.anchor or "", None)  # until it is closed, an alias to it would never end
                stack.append((event, []))
            elif isinstance(event, yaml.CollectionEndEvent):
                self.add(self.collection(*stack.pop()), stack)
            elif isinstance(event, yaml.ScalarEvent | yaml.AliasEvent):
                node = self.scalar(event) if isinstance(event, yaml.ScalarEvent) else self.alias(event)
                self.add(node, stack)
            elif isinstance(event, yaml.DocumentStartEvent):
                self.limit(self.root is None, self.at(event), "a second document, expected one recipe per file")

    def at(self, event: Any) -> Place:
        return Place(self.file, event.start_mark.line + 1, event.start_mark.column + 1)

    def add(self, node: _Node, stack: list[tuple[Any, list[_Node]]]) -> None:
        self.count += 1
        self.limit(self.count <= MAX_VALUES, node.place, f"more than {MAX_VALUES} values, too many for a recipe")
        if stack:
            stack[-1][1].append(node)
        else:
            self.root = node

    def collection(self, start: Any, children: list[_Node]) -> _Node:
        if isinstance(start, yaml.SequenceStartEvent):
            return self.keep(start.anchor, _Node(self.at(start), children, is_list=True))
        pairs = list(zip(children[::2], children[1::2], strict=True))
        return self.keep(start.anchor, _Node(self.at(start), pairs, is_map=True))

    def keep(self, anchor: str | None, node: _Node) -> _Node:
        if anchor is not None:
            self.anchors[anchor] = node
        return node

    def scalar(self, event: Any) -> _Node:
        self.check_tag(event)
        return self.keep(event.anchor, _Node(self.at(event), scalar(event.value) if event.implicit[0] else event.value))

    def alias(self, event: Any) -> _Node:
        self.aliases += 1
        self.limit(self.aliases <= MAX_ALIASES, self.at(event), f"more than {MAX_ALIASES} aliases")
        known = event.anchor in self.anchors
        self.limit(known, self.at(event), f"alias *{short(event.anchor)} has no anchor that ends before it")
        node = self.anchors[event.anchor]
        return _Node(self.at(event), node.content, node.is_map, node.is_list)

    def check_tag(self, event: Any) -> None:
        if event.tag is not None:
            self.complain(self.at(event), (), f"tag {short(event.tag)} refused: a recipe is plain data")

    # ---------------------------------------------------------------------------------------------- nodes -> data

    def document(self) -> Document:
        start = Place(self.file, 1, 1)
        root = self.root
        empty = root is None or root.content is None
        self.limit(not empty, start, "empty, expected a recipe")
        assert root is not None
        self.count = 0
        self.result.data = self.build(root, ())
        return self.result

    def build(self, node: _Node, path: Path) -> Any:
        self.count += 1
        self.limit(self.count <= MAX_VALUES, node.place, f"aliases make more than {MAX_VALUES} values")
        self.limit(len(path) <= MAX_DEPTH, node.place, f"more than {MAX_DEPTH} levels deep")
        self.result.values[path] = node.place
        if node.is_map:
            return self.build_map(node, path)
        if node.is_list:
            return [self.build(child, (*path, i)) for i, child in enumerate(node.content)]
        return self.plain(node, path)

    def build_map(self, node: _Node, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in node.content:
            name = key.content
            if self.is_good_key(key, data, path):
                self.result.keys[(*path, name)] = key.place
                data[name] = self.build(value, (*path, name))
        return data

    def is_good_key(self, key: _Node, data: dict[str, Any], path: Path) -> bool:
        name = key.content
        if key.is_map or key.is_list or not isinstance(name, str):
            self.complain(key.place, path, "key is not text, put it in quotes")
        elif name == "<<":
            self.complain(key.place, path, "merge keys (<<) are not read, write the keys out")
        elif name in data:
            first = self.result.keys[(*path, name)]
            where = f"line {first.line}, column {first.column}"
            self.complain(key.place, (*path, name), f"duplicate key, first at {where}")
        else:
            return True
        return False

    def plain(self, node: _Node, path: Path) -> Any:
        value = node.content
        if isinstance(value, float) and not math.isfinite(value):
            self.complain(node.place, path, "expected a finite number")
            return 0.0
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            self.complain(node.place, path, "half a character (a lone surrogate)")
        return value
