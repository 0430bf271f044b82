"""The table that ends Part II: the blocks of book/table.md, from `blr.TABLE` and measurements.

    make_table.py             write the blocks, with the deviations in book/results/table.json
                              and the ratios in benchmarks/results/
    make_table.py --measure   first run every oracle and write book/results/table.json
    make_table.py --check     are the blocks what would be written?

Everything else on the page is prose, edited there.
"""

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

import blr
from blr.recipes import TABLE, Row

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "book/table.md"
MEASURED = ROOT / "book/results/table.json"


def oracles() -> tuple[dict[str, Callable[[Row], float]], dict[str, float]]:
    """The oracles of the tests, and the deviations that they allow."""
    sys.path.insert(0, str(ROOT / "tests"))
    import oracles

    return oracles.ORACLES, oracles.TOLERANCE


def measure() -> None:
    """Run every oracle and write down the largest deviation that it finds."""
    held, _ = oracles()
    commit = ["git", "rev-parse", "--short", "HEAD"]
    found = {
        "command": "make table ARGS=--measure",
        "commit": subprocess.run(
            commit, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
        "largest_deviation": {row.name: float(f"{held[row.name](row):.1e}") for row in TABLE},
    }
    MEASURED.parent.mkdir(exist_ok=True)
    MEASURED.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def code(name: str, role: str, module: str) -> str:
    """A link to the reference of the library."""
    return f"{{py:{role}}}`{name} <{module}.{name}>`"


def table(name: str, caption: str, head: str, rows: list[list[str]]) -> str:
    """A table with a number; the columns of `head` are separated by commas."""
    cells = [head.split(", "), ["---"] * len(head.split(", ")), *rows]
    # |B| is a number of examples, not two cells.
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in cells]
    return "\n".join([f":::{{table}} {caption}", f":name: tab-rule-{name}", "", *lines, ":::"])


def rows() -> str:
    """What each row is made of."""
    lines = []
    for row in TABLE:
        exported = row.family.__name__ in blr.__all__
        family = code(row.family.__name__, "class", "blr" if exported else row.family.__module__)
        liberties = ", ".join(row.liberties) or "none"
        equation = f"{{eq}}`{row.equation}`"
        lines.append([row.name, family, row.gradient, liberties, row.schedule, equation])
    caption = "The rows of the table. An algorithm without liberties is the rule itself."
    head = "algorithm, family, gradient, liberties, schedule, equation"
    return table("rows", caption, head, lines)


def tests() -> str:
    """What each row is held against."""
    held, allowed = oracles()
    measured = json.loads(MEASURED.read_text())["largest_deviation"]
    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    files = f"{repository['url']}/blob/{repository['branch']}/"
    lines = []
    for row in TABLE:
        oracle = held[row.name]
        path = f"tests/{oracle.__module__.replace('.', '/')}.py"
        found = f"{measured[row.name]:.0e}".replace("e-0", "e-")
        if measured[row.name] > allowed.get(row.name, 1e-10):
            raise ValueError(f"{row.name} deviates by {found}, more than its test allows")
        recipe = code(row.build.__name__, "func", "blr.recipes")
        test = f"[{Path(path).name}]({files}{path})"
        name = row.name if row.section == "–" else f"{row.name} ({row.section})"
        lines.append([name, row.oracle, found, recipe, test])
    caption = "What each row was held against, and the largest relative deviation found."
    head = "algorithm, oracle, largest deviation, code, test"
    return table("tests", caption, head, lines)


def speed() -> str:
    """What the benchmarks of Part II measured: medians of ratios, in one run with the peer."""
    found = {
        name: json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
        for name in ("engine", "messages", "squared_gradients")
    }
    lines = []
    for problem, what in (
        ("cheap_loss", "the update alone"),
        ("network", "with a network's gradient"),
    ):
        for name in ("sgd", "rule", "adam", "ivon"):
            row = found["engine"][problem][name]
            hand, tuned = (row[f"engine_over_{peer}"]["median"] for peer in ("hand", "tuned"))
            cost = f"{hand:.2f}× the time of lines by hand, {tuned:.2f}× of tuned ones"
            lines.append([f"`blr.run`, 10⁶ parameters, {name}, {what}", cost])
    for name, row in found["messages"].items():
        if isinstance(row, dict) and "scikit_learn_over_blr" in row:
            sizes = ", ".join(f"{k} {v:,}" for k, v in row.items() if isinstance(v, int))
            ratio = row["scikit_learn_over_blr"]["median"]
            what = f"{name.partition('_')[0].upper()}: {sizes}"
            lines.append([what, f"{ratio:.2f}× as fast as scikit-learn"])
    for name in ("perceptron", "convolutions"):
        row = found["squared_gradients"][name]
        whole, chunks = (row[f"{part}vmap_over_blr"]["median"] for part in ("", "chunked_"))
        cost = f"{whole:.1f}× as fast as vmap(grad), {chunks:.1f}× in chunks of 16"
        lines.append([f"squared gradients of 128 examples, {name}", cost])
    caption = "What it costs, measured by `make benchmark`: medians of ratios, one thread."
    return table("speed", caption, "what, against its peer", lines)


def rendered(page: str) -> str:
    """The page with its blocks written anew."""
    blocks: dict[str, Callable[[], str]] = {
        "rows": rows,
        "tests": tests,
        "speed": speed,
    }
    for name, block in blocks.items():
        pattern = re.compile(
            rf"(?<=^% {name}, written by make table\n\n).*?(?=\n\n% end$)", re.M | re.S
        )
        page, count = pattern.subn(lambda _: block(), page)  # noqa: B023
        if count != 1:
            raise ValueError(f"{PAGE.name} needs one block between '% {name}, …' and '% end'")
    return page


def main(arguments: Any = None) -> int:
    """Write the page, or say that it is stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="run the oracles first")
    parser.add_argument("--check", action="store_true", help="write nothing, report")
    options = parser.parse_args(arguments)
    if options.measure:
        torch.set_num_threads(1)
        measure()
    page = PAGE.read_text()
    new = rendered(page)
    if options.check:
        if new != page:
            print(f"{PAGE.name} is not what TABLE and the measurements give: make table")
        return int(new != page)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
