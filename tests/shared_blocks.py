"""Blocks that mean the same in several algorithm files stand there word for word the same.

python tests/shared_blocks.py          names the first line that differs, if any
python tests/shared_blocks.py --fix    copies each block from its reference file, the first, to the others
"""

import ast
import functools
import itertools
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "algorithms"
EVERY = "td3 ddpg sac_value sac fqi fqi_amortized nfqca soft_fqi dqn reinforce ppo svg svg_model shac"
OFF_POLICY = "td3 ddpg sac_value sac dqn"
REPLAY = "td3 ddpg sac_value sac dqn svg_model"
BOX = "td3 ddpg sac_value sac nfqca svg svg_model"
DISCRETE = "fqi fqi_amortized soft_fqi reinforce ppo"
FITTED = "fqi fqi_amortized nfqca soft_fqi"

SHARED = [  # names of top-level definitions, and the files that have them; the first file is the reference
    ("Count mlp_init mlp act evaluate check", EVERY),
    ("train", "td3 ddpg sac_value sac dqn reinforce ppo svg svg_model"),
    ("Transition", "td3 ddpg sac_value sac dqn fqi fqi_amortized nfqca soft_fqi svg_model"),
    ("optimizer apply_grads", "td3 ddpg sac_value sac dqn fqi fqi_amortized nfqca soft_fqi"),
    ("rollout", "td3 sac_value sac dqn fqi fqi_amortized nfqca soft_fqi svg_model"),
    ("greedy Env make_env", BOX),
    ("example store sample_rows read", REPLAY),
    ("critic", "td3 ddpg sac_value sac fqi_amortized nfqca"),
    ("num_epochs", OFF_POLICY),
    ("RULES num_iterations", "td3 ddpg sac_value sac dqn reinforce ppo"),
    ("RULES", "td3 svg svg_model"),
    ("State collect", "td3 sac_value sac dqn"),
    ("twin_critics critic_loss", "td3 sac_value sac"),
    ("warm_up", "td3 sac_value sac svg_model"),
    ("OptState", "td3 ddpg reinforce"),
    ("actor", "td3 ddpg fqi_amortized nfqca"),
    ("explore", "td3 nfqca"),
    ("actor policy sample_action", "sac_value sac soft_fqi"),
    ("explore iteration epoch", "sac_value sac"),
    ("epoch", "sac reinforce ppo"),
    ("Transition Actor OptState State policy critic advantages critic_loss encode rollout num_epochs", "reinforce ppo"),
    ("epoch", "ddpg dqn"),
    ("Env make_env", DISCRETE),
    ("RULES critic_loss fit scale_inputs collect prepare train", FITTED),
    ("repeat steps_per_round add_round num_epochs keep_best epoch", "fqi fqi_amortized nfqca"),
    ("actor_init critic_init fit_critic", "fqi_amortized nfqca"),
    ("critic critic_init quadratic_features fit_quadratic fit_critic", "fqi soft_fqi"),
    ("Params", "fqi_amortized nfqca soft_fqi"),
    ("random_policy project", "fqi fqi_amortized soft_fqi"),
    ("num_epochs", "soft_fqi svg svg_model"),
    ("CHUNK MAX_GRID maximize gradient_ascent lbfgs cross_entropy grid exhaustive import_solver", "fqi fqi_amortized"),
    ("explore check_choices", "fqi fqi_amortized"),
    ("apply_grads", "reinforce svg_model"),
    ("apply_grads", "td3 svg"),
    ("gaussian actor sample_action epoch", "svg svg_model"),
    ("greedy Env RULES num_iterations train OptState", "td3 shac"),
    ("State critic_loss apply_grads rollout num_epochs epoch", "reinforce shac"),
    ("gaussian actor sample_action", "svg shac"),
    ("optimizer", "svg_model shac"),
]


@functools.cache
def definitions(text):
    """`{name: (first, last)}`: the lines, from 0, of each top-level class, function or assignment, with decorators."""
    lines = {}
    for node in ast.parse(text).body:
        names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        for name in names or filter(None, [getattr(node, "name", None)]):
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            lines[name] = first - 1, node.end_lineno
    return lines


def block(file, name):
    """The lines of a definition; KeyError where the file has none of that name."""
    text = (FOLDER / f"{file}.py").read_text()
    first, last = definitions(text)[name]
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
            first, last = definitions(text)[name]
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
