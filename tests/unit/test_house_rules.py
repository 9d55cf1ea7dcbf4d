"""The rules of the house that ruff cannot see: who may import whom, read the environment, print.

Each rule is a function from one source file to its violations, and is shown a file that breaks it
before it is turned on the package.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up: a room imports only from floors below its own. Rooms on one floor do not know
# each other. A new file must be given a place here.
FLOORS = (
    ("errors",),
    ("capture", "companion", "kernels", "parameters", "structure"),
    ("version", "layout", "update_rules", "orthogonalize", "routing", "failure", "phases", "units"),
    (
        "cost",
        "diagnostics",
        "fixed_order",
        "more_options",
        "qk_clip",
        "recipes",
        "rounding",
        "row_state",
        "splits",
        "stacks",
    ),
    ("ownership", "options", "param_groups", "reduction", "split_plan"),
    ("plan", "choice", "group_check"),
    # Above this line rooms may communicate.
    ("connections",),
    ("watched_group",),
    ("collectives",),
    ("agreement", "dcp", "exchange", "shard", "split_exchange"),
    ("buckets", "publication"),
    ("work",),
    ("matrix_updates",),
    (
        "clipping",
        "companion_step",
        "description",
        "desync",
        "reducer",
        "relayout",
        "state_part",
        "steps",
    ),
    ("state_io",),
    ("gradients",),
    ("norms", "observer"),
    ("engine",),
    ("report",),
    ("summary",),
    ("saved_optimizer",),
    ("optimizer",),
    ("grad_scaler",),
    ("distmuon",),
    ("checkpoint", "migrate"),
    ("adapters",),
    ("deepspeed",),
    ("pictures",),
    ("training", "selftest", "measure"),
    ("forecast",),
    ("cli",),
    ("__main__",),
    ("launch",),
)
PURE_FLOORS = 6
TALKING_ROOMS = ("cli", "training", "launch")
# The main job uses the optimizer as any user does.
PUBLIC_ROOMS = (
    "distmuon",
    "deepspeed",
    "diagnostics",
    "errors",
    "training",
    "checkpoint",
    "adapters",
    "param_groups",
    "orthogonalize",
    "qk_clip",
    "update_rules",
    "report",
    "units",
    "pictures",
)

# DeepSpeed has no registry but torch.optim's names; `register` says so and is never called for you.
PATCHES_ON_REQUEST = {("distmuon/adapters/deepspeed/by_name.py", "torch.optim.DistMuon")}

MAX_LINES = 400
MAX_STATEMENTS = 40


@dataclass(frozen=True, slots=True)
class Source:
    """A file of the package: its place, `distmuon/training/config.py`, and its text."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        parts = Path(self.path).with_suffix("").parts
        if parts[0] != "distmuon":
            return parts[0]
        return "distmuon" if parts[1] == "__init__" else parts[1]


Rule = Callable[[Source], Iterator[str]]
KNOWN_ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _imports(source: Source) -> Iterator[tuple[int, str]]:
    """Every imported name in full, `from torch import distributed` as `torch.distributed`."""
    package = Path(source.path).parent.parts
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def _dotted(node: ast.expr) -> str:
    """`torch.distributed.barrier` for an attribute chain, or what can be told of it."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    names.append(node.id if isinstance(node, ast.Name) else "?")
    return ".".join(reversed(names))


def imports_go_down(source: Source) -> Iterator[str]:
    if source.room not in KNOWN_ROOMS:
        yield f"1: room {source.room!r} has no place in FLOORS of {Path(__file__).name}"
        return
    for line, name in _imports(source):
        first, _, rest = name.partition(".")
        if first not in ("distmuon", "launch"):
            continue
        inner = rest.partition(".")[0]
        room = "launch" if first == "launch" else inner if inner in KNOWN_ROOMS else "distmuon"
        if room != source.room and KNOWN_ROOMS[room] >= KNOWN_ROOMS[source.room]:
            yield f"{line}: {source.room} imports {name}, which is not below it"
        if source.room == "training" and room not in PUBLIC_ROOMS:
            yield f"{line}: training imports {name}; it may only use what users do"


def pure_rooms_do_not_communicate(source: Source) -> Iterator[str]:
    if KNOWN_ROOMS.get(source.room, 0) >= PURE_FLOORS:
        return
    named = [(n.lineno, _dotted(n)) for n in ast.walk(source.tree) if isinstance(n, ast.Attribute)]
    for line, name in [*_imports(source), *named]:
        if f"{name}.".startswith("torch.distributed."):
            yield f"{line}: {source.room} is pure, but knows {name}"


def only_config_reads_the_environment(source: Source) -> Iterator[str]:
    if source.path == "distmuon/training/config.py":
        return
    banned = ("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv")
    named = [(n.lineno, _dotted(n)) for n in ast.walk(source.tree) if isinstance(n, ast.Attribute)]
    for line, name in [*_imports(source), *named]:
        if name in banned:
            yield f"{line}: {name} outside distmuon/training/config.py"


def files_are_short(source: Source) -> Iterator[str]:
    lines = source.text.count("\n")
    if lines >= MAX_LINES:
        yield f"{lines}: {lines} lines, must be under {MAX_LINES}"


def functions_are_short(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            count = sum(isinstance(inner, ast.stmt) for inner in ast.walk(node)) - 1
            if count > MAX_STATEMENTS:
                yield f"{node.lineno}: {node.name} has {count} statements, at most {MAX_STATEMENTS}"


def only_rooms_with_a_reader_print(source: Source) -> Iterator[str]:
    if source.room in TALKING_ROOMS:
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and _dotted(node.func) in ("print", "sys.stdout.write"):
            yield f"{node.lineno}: {source.room} prints"


def nobody_patches_another_module(source: Source) -> Iterator[str]:
    imported = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(source.tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    for node in ast.walk(source.tree):
        targets: list[ast.expr] = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and _dotted(node.func) in ("setattr", "delattr"):
            targets = [ast.Attribute(node.args[0], "?")]
        for target in targets:
            for part in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
                name = _dotted(part)
                if (source.path, name) in PATCHES_ON_REQUEST:
                    continue
                if isinstance(part, ast.Attribute) and name.partition(".")[0] in imported:
                    yield f"{node.lineno}: assigns to {name}, which belongs to another module"


def _sources() -> list[Source]:
    paths = [path for room in ("distmuon", "launch") for path in (ROOT / room).rglob("*.py")]
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text()) for path in sorted(paths)]


RULES: tuple[Rule, ...] = (
    imports_go_down,
    pure_rooms_do_not_communicate,
    only_config_reads_the_environment,
    files_are_short,
    functions_are_short,
    only_rooms_with_a_reader_print,
    nobody_patches_another_module,
)

LONG_FUNCTION = "def f(x):\n" + "    x += 1\n" * 41

BROKEN: tuple[tuple[Rule, str, str], ...] = (
    (imports_go_down, "distmuon/plan.py", "from distmuon.exchange import Exchange"),
    (imports_go_down, "distmuon/plan.py", "def f():\n    import distmuon.optimizer"),
    (imports_go_down, "distmuon/plan.py", "from distmuon import optimizer"),
    (imports_go_down, "distmuon/plan.py", "from distmuon import Muon"),
    (imports_go_down, "distmuon/plan.py", "from . import shard"),
    (imports_go_down, "distmuon/plan.py", "from .shard import Shard"),
    (imports_go_down, "distmuon/orthogonalize/api.py", "from ..plan import build_plan"),
    (imports_go_down, "distmuon/exchange.py", "from distmuon.shard import Shard"),
    (imports_go_down, "distmuon/optimizer.py", "import launch.train"),
    (imports_go_down, "distmuon/training/loop.py", "from distmuon.shard import Shard"),
    (imports_go_down, "distmuon/attic.py", ""),
    (pure_rooms_do_not_communicate, "distmuon/plan.py", "import torch.distributed as dist"),
    (pure_rooms_do_not_communicate, "distmuon/plan.py", "from torch import distributed"),
    (
        pure_rooms_do_not_communicate,
        "distmuon/orthogonalize/api.py",
        "if TYPE_CHECKING:\n    from torch.distributed.tensor import DTensor",
    ),
    (pure_rooms_do_not_communicate, "distmuon/layout.py", "torch.distributed.barrier()"),
    (only_config_reads_the_environment, "distmuon/exchange.py", "rank = os.environ['RANK']"),
    (only_config_reads_the_environment, "distmuon/training/loop.py", "os.getenv('CI')"),
    (only_config_reads_the_environment, "launch/train.py", "from os import environ"),
    (files_are_short, "distmuon/plan.py", "\n" * 400),
    (functions_are_short, "distmuon/plan.py", LONG_FUNCTION),
    (only_rooms_with_a_reader_print, "distmuon/optimizer.py", "print('step')"),
    (only_rooms_with_a_reader_print, "distmuon/optimizer.py", "sys.stdout.write('step')"),
    (nobody_patches_another_module, "distmuon/shard.py", "import torch\ntorch.mm = f"),
    (nobody_patches_another_module, "distmuon/shard.py", "import torch as t\nt.a.b, x = f, 1"),
    (
        nobody_patches_another_module,
        "distmuon/adapters/deepspeed.py",
        "from deepspeed import Engine\nEngine.step = f",
    ),
    (nobody_patches_another_module, "distmuon/shard.py", "import a\nsetattr(a.b, 'step', f)"),
    (nobody_patches_another_module, "distmuon/shard.py", "import a\ndel a.step"),
)

KEPT: tuple[tuple[Rule, str, str], ...] = (
    (imports_go_down, "distmuon/plan.py", "from distmuon import layout"),
    (imports_go_down, "distmuon/plan.py", "from distmuon.layout import Layout\nimport torch"),
    (imports_go_down, "distmuon/orthogonalize/api.py", "from .guards import prescale"),
    (imports_go_down, "distmuon/training/loop.py", "from distmuon import Muon"),
    (imports_go_down, "launch/train.py", "from distmuon.training.main import main"),
    (pure_rooms_do_not_communicate, "distmuon/collectives.py", "import torch.distributed as dist"),
    (pure_rooms_do_not_communicate, "distmuon/plan.py", "import torch.distributions"),
    (only_config_reads_the_environment, "distmuon/training/config.py", "os.environ['RANK']"),
    (only_config_reads_the_environment, "distmuon/training/data.py", "os.path.join('a', 'b')"),
    (files_are_short, "distmuon/plan.py", "\n" * 399),
    (functions_are_short, "distmuon/plan.py", LONG_FUNCTION.rpartition("    ")[0]),
    (only_rooms_with_a_reader_print, "distmuon/training/progress.py", "print('step')"),
    (nobody_patches_another_module, "distmuon/shard.py", "import a\nself.a = a.b\nx = a.c"),
)


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN)
def test_a_rule_notices_when_it_is_broken(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text)))


@pytest.mark.parametrize(("rule", "path", "text"), KEPT)
def test_a_rule_lets_good_code_pass(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text))) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Rule) -> None:
    sources = _sources()
    assert len(sources) > 20, "the package was not found"
    violations = [f"{source.path}:{each}" for source in sources for each in rule(source)]
    assert not violations, "\n" + "\n".join(violations)


def test_every_rule_has_been_seen_to_fail() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES)
