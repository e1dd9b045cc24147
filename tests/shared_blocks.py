"""Blocks that mean the same in several algorithm files stand there word for word the same.

python tests/shared_blocks.py          names the first line that differs, if any
python tests/shared_blocks.py --fix    copies each block from its reference file, the first, to the others
"""

import ast
import itertools
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "algorithms"
REPLAY = "ddpg td3 sac_value sac svg"
BOX = "ddpg td3 sac_value sac nfqca svg"
DISCRETE = "fqi fqi_amortized soft_fqi reinforce"
FITTED = "fqi fqi_amortized nfqca soft_fqi"
EVERYWHERE = "td3 ddpg sac_value sac fqi fqi_amortized nfqca soft_fqi reinforce svg"

SHARED = [  # names of top-level definitions, and the files that have them; the first file is the reference
    ("mlp_init mlp flatten evaluate check train", EVERYWHERE),
    ("RULES", EVERYWHERE),
]


def find(text, name):
    """`(first, last)` lines, from 0, of the top-level class, function or assignment `name` with its decorators."""
    for node in ast.parse(text).body:
        targets = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        if name in (getattr(node, "name", None), *targets):
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            return first - 1, node.end_lineno
    raise LookupError(name)


def block(file, name):
    """The lines of a definition; LookupError where the file has none of that name."""
    text = (FOLDER / f"{file}.py").read_text()
    first, last = find(text, name)
    return text.splitlines()[first:last]


def differences():
    """A line for each block that is not as in its reference file: which files, and the first lines that differ."""
    for names, files in SHARED:
        reference, *others = files.split()
        for name, other in itertools.product(names.split(), others):
            pairs = itertools.zip_longest(block(reference, name), block(other, name), fillvalue="(the end)")
            differing = next((pair for pair in pairs if pair[0] != pair[1]), None)
            if differing:
                yield f"{name}: {reference}.py has {differing[0].strip()!r}, {other}.py has {differing[1].strip()!r}"


def fix():
    """Replace each block that differs by that of its reference file."""
    for names, files in SHARED:
        reference, *others = files.split()
        for name, other in itertools.product(names.split(), others):
            path = FOLDER / f"{other}.py"
            text = path.read_text()
            first, last = find(text, name)
            lines = text.splitlines()
            lines[first:last] = block(reference, name)
            path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--fix"]):
        sys.exit(__doc__)
    if sys.argv[1:]:
        fix()
    found = list(differences())
    print("\n".join(found) or "all shared blocks are the same")
    sys.exit(bool(found))
