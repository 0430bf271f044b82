"""From MyST to markdown that every notebook viewer shows, construct by construct."""

import pytest
from citations import Citations
from myst import Label, MystError, parse, scan
from pybtex.database import parse_string
from translate import Translator, expand

MACROS = {
    "E": r"\mathbb{E}",
    "T": r"\top",
    "dual": [r"\tilde{\lambda}_{#1}", 1],
    "KL": [r"\mathrm{KL}(#1 \| #2)", 2],
    "loss": r"\ell",
    "mean": [r"\E[#1]", 1],
}
PAGE = r"""# Title

(sec-a)=
## First

$$ a = b $$ (eq-one)

$$ unnumbered $$

:::{prf:definition} Leverage
:label: def-a

With $$ no $$ number, then

$$
h = x^\T x
$$ (eq-two)
:::

:::{prf:theorem}
:label: thm-a

Body.
:::

```{math}
:label: eq-three
c
```

:::{exercise}
:label: ex-a
Try.
:::

### Deeper

(sec-b)=
## Second
"""


def labels_of(page: str = PAGE) -> dict[str, Label]:
    cells = [(page, {}), ("", {"name": "fig-a", "caption": "x"})]
    return dict(scan(cells, "03_here", 3))


def translate(text: str, draft: bool = False) -> str:
    far = {
        "eq-far": Label("Eq.", "1.4", "01_far"),
        "01_far": Label("Section", "1", "01_far", "Far"),
    }
    works = Citations(parse_string(BIB, "bibtex"))
    page = Translator("03_here", 3, labels_of() | far, MACROS, works.cite, draft)
    return page.markdown(text)


BIB = r"""
@article{one2001, author = {M{\"o}ller, A.}, title = {T}, journal = {J}, year = {2001},
  doi = {10.1/x}}
@article{two2002, author = {A, B. and {van} C, D.}, title = {T}, journal = {J}, year = {2002}}
@book{three2003, author = {A, B. and C, D. and E, F.}, title = {T}, publisher = {P}, year = {2003},
  url = {https://example.org/three}}
"""


def test_labels_are_counted_by_kind_and_chapter() -> None:
    numbers = {name: (label.kind, label.number) for name, label in labels_of().items()}
    assert numbers == {
        "03_here": ("Section", "3"),
        "sec-a": ("Section", "3.1"),
        "eq-one": ("Eq.", "3.1"),
        "def-a": ("Definition", "3.1"),
        "eq-two": ("Eq.", "3.2"),
        "thm-a": ("Theorem", "3.2"),  # one counter with definitions
        "eq-three": ("Eq.", "3.3"),
        "ex-a": ("Exercise", "3.1"),
        "sec-b": ("Section", "3.2"),
        "fig-a": ("Fig.", "3.1"),
    }


@pytest.mark.parametrize(
    ("tex", "expanded"),
    [
        (r"\E x", r"\mathbb{E} x"),
        (r"\Eta \E_q", r"\Eta \mathbb{E}_q"),
        (r"\dual{i}\dual j", r"\tilde{\lambda}_{i}\tilde{\lambda}_{j}"),
        (r"\dual\alpha", r"\tilde{\lambda}_{\alpha}"),
        (r"\KL{q_{\lambda}}{p}", r"\mathrm{KL}(q_{\lambda} \| p)"),
        (r"\KL{\KL{a}{b}}{\{c\}}", r"\mathrm{KL}(\mathrm{KL}(a \| b) \| \{c\})"),
        (r"x^\T\loss", r"x^\top\ell"),
        (r"\loss(x)", r"\ell(x)"),
        (r"\mean{x}", r"\mathbb{E}[x]"),  # a macro may use another
    ],
)  # fmt: skip
def test_macros_are_expanded_as_tex_reads_them(tex: str, expanded: str) -> None:
    assert expand(tex, MACROS) == expanded


def test_a_circle_of_macros_and_a_missing_argument_are_errors() -> None:
    with pytest.raises(MystError, match="circle"):
        expand(r"\a", {"a": r"\b", "b": r"\a"})
    with pytest.raises(MystError, match="lacks an argument"):
        expand(r"\dual", MACROS)


@pytest.mark.parametrize(
    ("myst", "markdown"),
    [
        ("by {eq}`eq-one`.", "by Eq. (3.1)."),
        ("by {eq}`eq-far`.", "by [Eq. (1.4)](01_far.ipynb)."),
        ("{prf:ref}`thm-a`, {prf:ref}`def-a`", "Theorem 3.2, Definition 3.1"),
        ("{numref}`fig-a` {numref}`Figure %s <fig-a>`", "Fig. 3.1 Figure 3.1"),
        ("{numref}`ex-a` {numref}`sec-a`", "Exercise 3.1 Section 3.1"),
        ("{ref}`sec-a` {ref}`there <sec-b>` {ref}`ex-a`", "First there Exercise 3.1"),
        ("{doc}`01_far` {doc}`it <01_far>`", "[Far](01_far.ipynb) [it](01_far.ipynb)"),
        ("{doc}`notation`", "[Notation](notation.md)"),
        ("{cite:t}`one2001`", "[Möller (2001)](https://doi.org/10.1/x)"),
        ("{cite:p}`two2002,three2003`", "(A and van C, 2002; [A et al., 2003](https://example.org/three))"),
        ("{cite:p}`two2002,\nthree2003`", "(A and van C, 2002; [A et al., 2003](https://example.org/three))"),
        ("$\\E$ and `$\\E$` and \\$5", "$\\mathbb{E}$ and `$\\E$` and \\$5"),
        ("``{eq}`x` ``", "``{eq}`x` ``"),
        ("[this](eq-one) [](thm-a) [web](https://a.b/c)", "this Theorem 3.2 [web](https://a.b/c)"),
        ("% a comment\nkept", "kept"),
    ],
)  # fmt: skip
def test_roles_become_text(myst: str, markdown: str) -> None:
    assert translate(myst) == markdown


@pytest.mark.parametrize(
    ("myst", "markdown"),
    [
        ("$$ x^\\T $$ (eq-one)", "$$\nx^\\top\n\\tag{3.1}\n$$"),
        ("$$\nx\n$$", "$$\nx\n$$"),
        ("- item\n\n  $$\n  x\n  $$ (eq-two)", "- item\n\n  $$\n  x\n  \\tag{3.2}\n  $$"),
        ("```{math}\n:label: eq-three\nc\n```", "$$\nc\n\\tag{3.3}\n$$"),
        ("```python\n$\\E$ {eq}`x`\n:::{note}\n```", "```python\n$\\E$ {eq}`x`\n:::{note}\n```"),
        ("(sec-a)=\n## First", '<a id="sec-a"></a>\n\n## 3.1. First'),
        ("| $\\E$ |\n|---|", "| $\\mathbb{E}$ |\n|---|"),
    ],
)
def test_blocks_outside_directives(myst: str, markdown: str) -> None:
    assert translate(myst) == markdown


@pytest.mark.parametrize(
    ("myst", "markdown"),
    [
        (
            ":::{prf:theorem} On $\\E$\n:label: thm-a\n\nBody.\n\n$$\na\n$$ (eq-one)\n:::",
            "> **Theorem 3.2 (On $\\mathbb{E}$).**\n>\n> Body.\n>\n> $$\n> a\n> \\tag{3.1}\n> $$",
        ),
        (":::{prf:proof}\nBy {eq}`eq-one`.\n:::", "> *Proof.* By Eq. (3.1)."),
        (
            "::::{prf:proof}\nA.\n\n:::{note}\nB.\n:::\n::::",
            "> *Proof.* A.\n>\n> > **Note.**\n> >\n> > B.",
        ),
        (":::{exercise}\n:label: ex-a\nTry.\n:::", "> **Exercise 3.1.**\n>\n> Try."),
        (
            ":::{solution} ex-a\n:class: dropdown\n\n$a$\n:::",
            "<details>\n<summary>Solution to Exercise 3.1</summary>\n\n$a$\n\n</details>",
        ),
        (":::{solution-start} ex-a\n:::", "**Solution to Exercise 3.1.**"),
        (":::{solution-end}\n:::", "---"),
        (":::{admonition} Open it\n:class: tip\nB\n:::", "> **Open it.**\n>\n> B"),
        (
            ":::{admonition} Open it\n:class: dropdown\nB\n:::",
            "<details>\n<summary>Open it</summary>\n\nB\n\n</details>",
        ),
        ("```{warning}\nCareful.\n```", "> **Warning.**\n>\n> Careful."),
        ("- a\n\n  :::{tip}\n  b\n  :::", "- a\n\n  > **Tip.**\n  >\n  > b"),
    ],
)
def test_directives_become_block_quotes(myst: str, markdown: str) -> None:
    assert translate(myst) == markdown


@pytest.mark.parametrize(
    ("myst", "complaint"),
    [
        ("{eq}`eq-none`", "no label 'eq-none'"),
        ("{cite:t}`nobody`", "no entry 'nobody'"),
        ("{glue}`x`", "role {glue}"),
        (":::{margin}\nx\n:::", "directive {margin}"),
        (":::{note}\nx", "never closed"),
        ("$$\nx\n\ny\n$$", "display math is not closed"),
        ("{ref}`eq-one`", "needs a text"),
        ("so $a\n- b$ holds", "like a list's"),
        ("costs $5\n\nand $x", "blank line"),
    ],
)
def test_what_the_notebook_cannot_show_is_an_error(myst: str, complaint: str) -> None:
    with pytest.raises(MystError, match=complaint):
        translate(myst)


@pytest.mark.parametrize("label", ["", ":label: Not_good\n"])
def test_a_numbered_block_needs_a_label_that_is_its_own_anchor(label: str) -> None:
    with pytest.raises(MystError, match=r"Theorem 3\.1 needs a label"):
        labels_of(f":::{{prf:theorem}}\n{label}x\n:::")


def test_a_draft_shows_unknown_labels() -> None:
    assert translate("{eq}`eq-none` and {prf:ref}`thm-a`", draft=True) == "?? ?? and Theorem 3.2"


def test_a_page_without_directives_is_kept() -> None:
    page = "Text.\n\n- a\n- b\n\n> quote\n\n1. *x*"
    assert translate(page) == page
    assert "\n".join(block.body for block in parse(page)) == page
