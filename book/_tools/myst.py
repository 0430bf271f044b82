"""The subset of MyST markdown in which this book is written: blocks, labels and their numbers.

`parse` cuts a page into text, code, math, targets, headings and directives. `scan` finds the labels
of a chapter and counts as Sphinx does, so that notebooks show the numbers of the site.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

PROOFS = "algorithm corollary definition example lemma proposition remark theorem".split()
FENCE = re.compile(r"( *)(:{3,}|`{3,}|~{3,})(?:\{([\w:-]+)\} *(.*)|.*)$")
MATH = re.compile(r"( *)\$\$(?!\$)(.*)$")
MATH_END = re.compile(r"(.*?)\$\$ *(?:\(([\w.:-]+)\))? *$")
TARGET = re.compile(r"\(([\w.:-]+)\)= *$")
HEADING = re.compile(r"(#{1,6}) +(.+?) *$")


class MystError(ValueError):
    """A construct that the notebooks cannot show, or a reference to nothing."""


@dataclass(frozen=True)
class Label:
    """What a reference shows: `Theorem 1.2` is kind, number; `chapter` is the stem of its file."""

    kind: str
    number: str
    chapter: str
    title: str = ""


@dataclass(frozen=True)
class Block:
    """One piece of a page: text, code, math, target, heading or directive."""

    kind: str
    body: str
    name: str = ""
    argument: str = ""
    label: str = ""
    indent: str = ""
    classes: str = ""


def parse(text: str) -> Iterator[Block]:
    """The blocks of a page in order; joined again they are the page."""
    lines, plain, i = text.split("\n"), [], 0

    def flush() -> Iterator[Block]:
        if plain:
            yield Block("text", "\n".join(plain))
            plain.clear()

    while i < len(lines):
        line, start = lines[i], i
        i += 1
        if fence := FENCE.match(line):
            yield from flush()
            close = re.compile(rf" *{fence[2][0]}{{{len(fence[2])},}} *$")
            while i < len(lines) and not close.match(lines[i]):
                i += 1
            if i == len(lines):
                raise MystError(f"{line.strip()!r} is never closed")
            body, i = [row.removeprefix(fence[1]) for row in lines[start + 1 : i]], i + 1
            yield _directive(fence, body) if fence[3] else Block("code", "\n".join(lines[start:i]))
        elif math := MATH.match(line):
            yield from flush()
            body = [math[2]]
            while not (end := MATH_END.match(body[-1])):
                if i == len(lines) or not lines[i].strip():
                    raise MystError(f"display math is not closed before a blank line: {body[0]!r}")
                body.append(lines[i])
                i += 1
            tex = "\n".join([*body[:-1], end[1]]).strip()
            yield Block("math", tex, label=end[2] or "", indent=math[1])
        elif target := TARGET.match(line):
            yield from flush()
            yield Block("target", "", label=target[1])
        elif heading := HEADING.match(line):
            yield from flush()
            yield Block("heading", heading[2], name=heading[1])
        elif not line.startswith("%"):
            plain.append(line)
    yield from flush()


def _directive(fence: re.Match[str], body: list[str]) -> Block:
    """A directive; its options are the `:key: value` lines at the top of its body."""
    options = {}
    while body and (option := re.match(r":([\w-]+): *(.*)$", body[0])):
        options[option[1]] = option[2].strip()
        body = body[1:]
    label = options.get("label") or options.get("name") or ""
    kind = "math" if fence[3] == "math" else "directive"
    return Block(kind, "\n".join(body).strip(), fence[3], fence[4].strip(), label, fence[1],
                 options.get("class", ""))  # fmt: skip


def kind_of(block: Block) -> str:
    """The noun that Sphinx prints before the number of a block, or "" where it prints none."""
    if block.kind == "math":
        return "Eq." if block.label else ""
    name = block.name.removeprefix("prf:")
    if block.name != name and name in PROOFS:
        return name.capitalize()
    return {"exercise": "Exercise", "table": "Table"}.get(block.name, "")


def counter_of(kind: str) -> str:
    """Theorems, definitions and their like share one counter; the other kinds have their own."""
    return "Theorem" if kind.lower() in PROOFS else kind


def scan(
    cells: Sequence[tuple[str, Mapping[str, str]]], chapter: str, number: int
) -> Iterator[tuple[str, Label]]:
    """The labels of one chapter, from its cells: (markdown, {}) or ("", {name, caption}).

    The chapter itself has the label of its name, so that {doc} finds its title.
    """
    count: Counter[str] = Counter()
    sections = [number, 0, 0, 0, 0, 0]
    pending: list[str] = []

    def visit(text: str) -> Iterator[tuple[str, Label]]:
        for block in parse(text):
            if block.kind == "target":
                pending.append(block.label)
            elif block.kind == "heading":
                dotted = advance(sections, len(block.name))
                for name in [*pending, *([chapter] if len(block.name) == 1 else [])]:
                    yield name, Label("Section", dotted, chapter, block.body)
                pending.clear()
            if kind := kind_of(block):
                counter = counter_of(kind)
                count[counter] += 1
                if not re.fullmatch(r"[a-z][a-z0-9-]*", block.label):
                    where = f"{chapter}: {kind} {number}.{count[counter]}"
                    raise MystError(f"{where} needs a label of letters a-z, digits and hyphens")
                yield (
                    block.label,
                    Label(kind, f"{number}.{count[counter]}", chapter, block.argument),
                )
            if block.kind == "directive" and block.name not in ("code-block", "code"):
                yield from visit(block.body)

    for text, figure in cells:
        if figure:
            count["Fig."] += 1
            yield figure["name"], Label("Fig.", f"{number}.{count['Fig.']}", chapter)
        else:
            yield from visit(text)


def advance(sections: list[int], level: int) -> str:
    """Count one heading of this level (1 is the chapter) in place; return its number."""
    if level > 1:
        sections[level - 1] += 1
    sections[level:] = [0] * (6 - level)
    return ".".join(map(str, sections[:level]))
