"""MyST markdown as markdown that every notebook viewer shows: JupyterLab, Colab, GitHub.

Directives become block quotes or <details>, roles become text and links, macros are expanded.
Anything outside the subset is an error with its place, never a silent pass: what the site shows and
the notebook garbles must not reach a reader.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from myst import Block, Label, MystError, advance, kind_of, parse

ADMONITIONS = "attention caution danger hint important note seealso tip warning".split()
INLINE = re.compile(
    r"(?P<escape>\\.)"
    r"|\{(?P<role>[\w:]+)\}`(?P<content>[^`]+)`"
    r"|(?P<code>(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))"
    r"|\$(?P<math>[^$]+)\$"
    r"|\[(?P<text>[^\]]*)\]\((?P<link>[\w.:/-]+)\)",
    re.S,
)


def expand(tex: str, macros: Mapping[str, str | Sequence]) -> str:
    """TeX without the book's macros. A macro is a string, or [string, number of arguments]."""
    pattern = re.compile(rf"\\({'|'.join(macros)})(?![A-Za-z])")
    for _ in range(1000):
        if not (found := pattern.search(tex)):
            return tex
        value = macros[found[1]]
        body, arity = (value, 0) if isinstance(value, str) else value
        end, arguments = found.end(), []
        for _ in range(arity):
            argument, end = _argument(tex, end)
            arguments.append(argument)
        for k, argument in enumerate(arguments, 1):
            body = body.replace(f"#{k}", argument)
        runs_on = re.search(r"\\[A-Za-z]+$", body) and tex[end : end + 1].isalpha()
        tex = tex[: found.start()] + body + (" " if runs_on else "") + tex[end:]
    raise MystError("the macros in _config.yml define each other in a circle")


def _argument(tex: str, start: int) -> tuple[str, int]:
    """The argument at `start`, as TeX reads it: a group, a command, or one character."""
    start += len(tex[start:]) - len(tex[start:].lstrip())
    if command := re.compile(r"\\(?:[A-Za-z]+|.)|[^{}]").match(tex, start):
        return command[0], command.end()
    depth = 0
    for i in range(start, len(tex)):
        escaped = i > start and tex[i - 1] == "\\"
        depth += 0 if escaped else {"{": 1, "}": -1}.get(tex[i], 0)
        if depth == 0:
            return tex[start + 1 : i], i + 1
    raise MystError(f"a macro lacks an argument in {tex!r}")


@dataclass
class Translator:
    """Translates the markdown cells of one chapter, in order (it counts headings).

    Args:
        chapter: Stem of the chapter's file.
        number: Its number.
        labels: All labels of the book, from `scan`.
        macros: The TeX macros of the site.
        cite: (kind, key) -> text of a citation, kind "t" (textual) or "p" (in parentheses).
        draft: Show unknown labels as `??` instead of failing.
    """

    chapter: str
    number: int
    labels: Mapping[str, Label]
    macros: Mapping[str, str | Sequence]
    cite: Callable[[str, str], str]
    draft: bool = False

    def __post_init__(self) -> None:
        self.sections = [self.number, 0, 0, 0, 0, 0]

    def markdown(self, text: str) -> str:
        """The page `text` for a notebook."""
        return "\n".join(self.block(block) for block in parse(text)).strip()

    def block(self, block: Block) -> str:
        """One block for a notebook."""
        match block.kind:
            case "text":
                return self.inline(block.body)
            case "code":
                return block.body
            case "target":
                return f'<a id="{block.label}"></a>\n'
            case "heading":
                dotted = advance(self.sections, len(block.name))
                return f"{block.name} {dotted}. {self.inline(block.body)}"
            case "math":
                tag = f"\n\\tag{{{self.find(block.label).number}}}" if block.label else ""
                rows = ["$$", *(expand(block.body, self.macros) + tag).split("\n"), "$$"]
                return "\n".join(block.indent + row for row in rows)
        text = self.directive(block)
        return "\n".join((block.indent + row).rstrip() for row in text.split("\n"))

    def directive(self, block: Block) -> str:
        """A directive: a block quote with a bold title, or <details> where the site folds it."""
        name, title = block.name, self.inline(block.argument)
        folded = "dropdown" in block.classes
        if name in ("code-block", "code"):
            return f"```{block.argument}\n{block.body}\n```"
        if name == "solution-end":
            return "---"
        body = self.markdown(block.body)
        if kind_of(block):
            label = self.find(block.label)
            head = f"{label.kind} {label.number}"
            if name == "table":
                return f"**{head}.** {title}\n\n{body}"
            return _quote(head + (f" ({title})" if title else ""), body)
        if name == "prf:proof":
            return _quote("", f"*Proof.* {body}")
        if name in ("solution", "solution-start"):
            label = self.find(block.argument)
            head = f"Solution to {label.kind} {label.number}"
            return _fold(head, body) if name == "solution" else f"**{head}.** {body}".strip()
        if name == "dropdown" or (name == "admonition" and folded):
            return _fold(title, body)
        if name == "admonition":
            return _quote(title, body)
        if name in ADMONITIONS:
            head = "See also" if name == "seealso" else name.capitalize()
            return _fold(head, body) if folded else _quote(head, f"{title} {body}".strip())
        raise MystError(f"{self.chapter}: the notebooks have no form for the directive {{{name}}}")

    def inline(self, text: str) -> str:
        """Running text with roles resolved, links to labels resolved and macros expanded."""

        def replace(m: re.Match[str]) -> str:
            if m["escape"] or m["code"]:
                return m[0]
            if m["math"]:
                if broken := re.search(r"\n\s*(\n|[-+*#>] )", m["math"]):
                    fault = "a blank line" if broken[1] == "\n" else "a line like a list's"
                    raise MystError(f"{self.chapter}: {fault} inside ${m['math'][:60]}")
                return f"${expand(m['math'], self.macros)}$"
            if m["role"]:
                return self.role(m["role"], " ".join(m["content"].split()))
            if m["link"] in self.labels:
                return self.link(m["text"] or self.name_of(m["link"]), m["link"])
            return m[0].replace(".md)", ".ipynb)") if m["link"][:-3] in self.labels else m[0]

        return INLINE.sub(replace, text)

    def role(self, role: str, content: str) -> str:
        """The text of a role, linked where it leads to another chapter."""
        if cite := re.fullmatch(r"cite(?::([tp]))?", role):
            kind, keys = cite[1] or "p", [key.strip() for key in content.split(",")]
            texts = [self.cite(kind, key) for key in keys]
            return "; ".join(texts) if kind == "t" else f"({'; '.join(texts)})"
        explicit = re.fullmatch(r"(.+?) *<(.+)>", content)
        text, target = (explicit[1], explicit[2]) if explicit else ("", content)
        if role == "doc":
            stem = target.removesuffix(".md").rsplit("/", 1)[-1]
            if stem in self.labels:
                return f"[{text or self.labels[stem].title}]({stem}.ipynb)"
            return f"[{text or stem.capitalize()}]({stem}.md)"
        if role not in ("eq", "prf:ref", "numref", "ref"):
            raise MystError(f"{self.chapter}: the notebooks have no form for the role {{{role}}}")
        label = self.find(target)
        if role == "numref" and text:
            text = text.replace("%s", label.number).replace("{number}", label.number)
        if role == "ref" and not text:
            if label.kind not in ("Section", "Exercise"):
                raise MystError(f"{self.chapter}: {{ref}} to {target!r} needs a text")
            text = label.title if label.kind == "Section" else ""
        return self.link(text or self.name_of(target), target)

    def name_of(self, target: str) -> str:
        """`Theorem 1.2`, `Eq. (1.2)`: the words for a label."""
        label = self.find(target)
        return f"Eq. ({label.number})" if label.kind == "Eq." else f"{label.kind} {label.number}"

    def link(self, text: str, target: str) -> str:
        """The text, linked to the notebook of its chapter unless that is this one."""
        chapter = self.find(target).chapter
        return text if chapter in (self.chapter, "") else f"[{text}]({chapter}.ipynb)"

    def find(self, target: str) -> Label:
        """The label of this name."""
        if target in self.labels:
            return self.labels[target]
        if self.draft:
            return Label("??", "??", "")
        raise MystError(f"{self.chapter}: no label {target!r} in the book")


def _quote(title: str, body: str) -> str:
    text = f"**{title}.**\n\n{body}" if title else body
    return "\n".join(f"> {row}".rstrip() for row in text.strip().split("\n"))


def _fold(summary: str, body: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{body}\n\n</details>"
