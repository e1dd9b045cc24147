"""The project's pages: their text, code, sections, tables and links."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "algorithms/README.md", "algorithms/CHAPTER.md", "common/README.md", ".github/CONTRIBUTING.md")
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
README, ALGORITHM_PAGE, CHAPTER, RUNNER, CONTRIBUTING = PAGES.values()
TEXT = "\n".join(PAGES.values())
RESULT_NAMES = tuple(f"results/{folder}README.md" for folder in ("", "changes/", "policies/"))
RESULTS = {name: (ROOT / name).read_text() for name in RESULT_NAMES}


def blocks(language, text=TEXT):
    """The code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def section(text, heading):
    """The text below a heading, up to the next one of the same level or a higher one."""
    level = heading.split()[0]
    (_, rest) = f"\n{text}".split(f"\n{heading}\n")
    return re.split(rf"\n#{{1,{len(level)}}} ", rest)[0]


def tables(text):
    """The tables, each a list of rows, each a list of cells; the line below the header is left out."""
    found = re.findall(r"(?:^\|.*\|\n)+", text + "\n", re.MULTILINE)
    rows = [[[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()] for table in found]
    return [[header, *body] for header, _, *body in rows]


def links(text):
    """`[(path, anchor)]` of the links to files of this project, either of which may be empty."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [(path, anchor) for path, _, anchor in (x.partition("#") for x in targets) if "://" not in path]


def anchors(text):
    """What a link can name: headings as GitHub spells them, and named anchors."""
    headings = re.findall(r"^#+ (?:<.*>)?(.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a (?:id|name)="(.*?)"', text))
