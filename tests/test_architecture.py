"""Who may import whom, read from the sources: arrows between rooms point down only (docs/design.md).

Every rule is a function of (file, source), so that each can be shown to catch what it forbids.
"""

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "precisebn"

FLOORS: list[set[str]] = [
    {"errors", "_reports", "_version", "_warnings"},
    {"_torch"},
    {"distributed"},
    {"ops"},
    {"statistics"},
    {"functional"},
    {"nn"},
    {"models"},
    {"recalibration", "conversion", "freezing", "tracking", "state", "ranks"},
    {"auditing"},
    {"integrations", "cli"},
    {"__init__"},  # the public names of the package
]
"""The rooms from the ground up. A room may import from its own files and from lower floors; rooms on one floor do not
know each other, so that recalibration and conversion never meet but in what both stand on."""

PRIVATE_NAMES: dict[str, set[str]] = {
    "nn": {"torch.nn.modules.batchnorm._BatchNorm", "torch.nn.modules.batchnorm._NormBase"},
    "models": {"torch.nn.modules.batchnorm._BatchNorm", "torch.nn.modules.batchnorm._NormBase"},
    "conversion": {
        "torch.nn.modules.batchnorm._BatchNorm",
        "torch.nn.modules.batchnorm._NormBase",
        "torch.nn.modules.module._WrappedHook",
        "torch._dynamo.OptimizedModule",
    },
    "recalibration": {"torch.nn.modules.batchnorm._BatchNorm", "torch.nn.modules.batchnorm._NormBase"},
}
"""Private names of torch that stand outside of ``_torch.py``. The list may shrink, and is not to grow."""

PRIVATE_MODULES = {"_C", "_dynamo"}  # names in them are counted one by one

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    [floor] = [i for i, rooms in enumerate(FLOORS) if room in rooms]
    return floor


def imported(source: str) -> Iterator[str]:
    """Every name that is imported anywhere in the source, in full; a module imported for its names is one of them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_used(source: str) -> set[str]:
    """The rooms that a source imports from; the package itself counts as the room that holds the name."""
    rooms = {room for floor in FLOORS for room in floor}
    used = set()
    for name in imported(source):
        package, *inside = name.split(".")
        if package == "precisebn":
            used.add(inside[0] if inside and inside[0] in rooms else "__init__")
    return used


def torch_names(source: str) -> set[str]:
    """The names of torch that a source imports or reaches by attributes, in full; not those of torch.ops, our own."""
    tree = ast.parse(source)
    meaning = {}  # of a name in this file
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                meaning[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            meaning |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = {name for name in imported(source) if name.split(".")[0] == "torch"}
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name):
            name = ".".join([meaning.get(node.id, "?"), *parts])
            if name.startswith("torch.") and not name.startswith("torch.ops."):
                found.add(name)
    return found


def private(names: set[str]) -> set[str]:
    """The private ones, each as far as it tells which: ``torch._C._name``, ``torch.nn.modules.module._name``."""
    found = set()
    for name in names:
        parts = name.split(".")
        hidden = [i for i, part in enumerate(parts) if part.startswith("_") and not part.endswith("__")]
        if hidden:
            is_module = parts[hidden[0]] in PRIVATE_MODULES
            found.add(".".join(parts[: hidden[0] + 1 + is_module]))
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_its_own_room_and_from_lower_floors(path: Path) -> None:
    own = room_of(path)
    assert any(own in rooms for rooms in FLOORS), f"a new room: say in FLOORS on which floor {own} lies"
    used = rooms_used(path.read_text()) - {own}
    assert {room for room in used if floor_of(room) >= floor_of(own)} == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_distributed_knows_torch_distributed(path: Path) -> None:
    if room_of(path) not in ("distributed", "_torch"):  # where what is private of it stands
        assert {name for name in torch_names(path.read_text()) if name.startswith("torch.distributed")} == set()


MAKERS = frozenset(
    {"arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"}
    | {"tensor", "zeros"}
)
"""Functions of torch that make a tensor, on torch's default device where none is named."""


def makers_without_device(source: str) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call)
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "torch"
        and call.func.attr in MAKERS
        and not {"device", None} & {keyword.arg for keyword in call.keywords}  # None: **kwargs
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_tensor_is_made_on_a_device_that_is_named(path: Path) -> None:
    """torch.set_default_device("cuda") is no reason for what belongs on the CPU to be there."""
    assert makers_without_device(path.read_text()) == []


def place_in_the_table(path: Path, rows: list[list[str]]) -> int:
    """Which row of docs/design.md lists a file: by its name, as one of ``room/NAME.py``, or with its room."""
    name = path.relative_to(PACKAGE).as_posix()
    room = name.rpartition("/")[0]
    for entry in (name, f"{room}/NAME.py", f"{room}/", f"{room.partition('/')[0]}/"):
        for index, row in enumerate(rows):
            if entry in row:
                return index
    raise AssertionError(f"docs/design.md does not list {name}")


def test_the_table_of_files_has_all_in_the_order_in_which_they_import_each_other() -> None:
    lines = (ROOT / "docs" / "design.md").read_text().splitlines()
    rows = [re.findall(r"`([^`]+)`", line.split(" | ")[0]) for line in lines if line.startswith("| `")]
    files = [path for path in FILES if path.name not in ("__init__.py", "_version.py")]
    place = {f"precisebn.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}": path for path in files}
    upward = []
    for path in files:
        for name in imported(path.read_text()):
            found = place.get(name) or place.get(name.rpartition(".")[0])
            if found is not None and place_in_the_table(found, rows) > place_in_the_table(path, rows):
                upward.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert upward == []


def test_private_names_of_torch_stand_in_one_file_and_the_exceptions_do_not_grow() -> None:
    found: dict[str, set[str]] = {}
    for path in FILES:
        if room_of(path) != "_torch":
            found.setdefault(room_of(path), set()).update(private(torch_names(path.read_text())))
    grown = {room: names - PRIVATE_NAMES.get(room, set()) for room, names in found.items()}
    assert {room: names for room, names in grown.items() if names} == {}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    declared = {line.partition(">")[0] for line in setup["options"]["install_requires"].split()}
    optional = {"matplotlib", "rich", "safetensors"}  # of the extras `plot`, `tables` and `state`
    used = {name.split(".")[0] for path in FILES for name in imported(path.read_text())}
    assert used - set(sys.stdlib_module_names) - {"precisebn"} - optional == declared


def test_the_package_works_without_numpy() -> None:
    script = """
import sys, warnings
sys.modules["numpy"] = None
warnings.simplefilter("ignore")  # torch says that it misses it
import torch, precisebn
model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
report = precisebn.update_bn_stats(model, [torch.randn(8, 3, 4, 4) for _ in range(3)], num_iters=None)
precisebn.convert_to_batchnorm(precisebn.convert_frozen_batchnorm(model))
print(report, report.to_dict())
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, timeout=120)


# ---- The rules themselves --------------------------------------------------------------------------------------------


def test_rooms_are_seen_in_every_form_of_import() -> None:
    assert rooms_used("import precisebn.conversion.engine") == {"conversion"}
    assert rooms_used("from precisebn import ops, Moments") == {"ops", "__init__"}
    assert rooms_used("def f():\n    from precisebn.models.batches import move_to") == {"models"}
    assert rooms_used("from torch import nn\nimport precisebn") == {"__init__"}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch.distributed as dist", {"torch.distributed"}),
        ("from torch import distributed", {"torch.distributed"}),
        ("from torch.distributed import all_reduce", {"torch.distributed.all_reduce"}),
        ("import torch\ntorch.distributed.barrier()", {"torch.distributed", "torch.distributed.barrier"}),
        ("from torch.nn.parallel import DistributedDataParallel", set()),
    ],
)
def test_torch_distributed_is_seen_in_every_form(source: str, names: set[str]) -> None:
    assert {name for name in torch_names(source) if name.startswith("torch.distributed")} == names


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch\ntorch._C._current_graph_task_id()", {"torch._C._current_graph_task_id"}),
        ("from torch.nn.modules.batchnorm import _NormBase as Base", {"torch.nn.modules.batchnorm._NormBase"}),
        (
            "from torch.autograd import forward_ad\nforward_ad._current_level",
            {"torch.autograd.forward_ad._current_level"},
        ),
        ("import torch._dynamo\ntorch._dynamo.reset()", {"torch._dynamo.reset"}),
        ("from torch._dynamo import OptimizedModule", {"torch._dynamo.OptimizedModule"}),
        ("import torch\ntorch.ops.precisebn._moments.default, torch.__version__", set()),
    ],
)
def test_private_names_are_seen_in_every_form(source: str, names: set[str]) -> None:
    assert private(torch_names(source)) == names


def test_tensors_without_a_device_are_seen() -> None:
    assert makers_without_device("torch.zeros(2).add(torch.arange(3, device='cpu'))") == ["torch.zeros(2)"]
    assert makers_without_device("x.new_zeros(2), torch.zeros_like(x), torch.tensor(1, **options)") == []
