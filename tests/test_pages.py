"""The pages: every public name stands on docs/api.md, every replacement on docs/migration.md runs, all code runs."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import processes
import pytest
import torch
from torch import nn

import precisebn
from precisebn import convert_frozen_batchnorm
from precisebn.nn import FrozenBatchNorm2d

DOCS = Path(__file__).parent.parent / "docs"
NAMESPACES = ("precisebn", "precisebn.nn", "precisebn.functional", "precisebn.ops")

pytestmark = pytest.mark.usefixtures("one_thread")


def sections(page: Path) -> dict[str, str]:
    """The text under each heading of the second level."""
    parts = re.split(r"^## (.+)$", page.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> list[list[str]]:
    """The cells of the tables in a text, without head and rule."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    rules = [i for i, row in enumerate(cells) if set("".join(row)) <= set("-|")]
    return [row for i, row in enumerate(cells) if i not in rules and i + 1 not in rules]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_public_name_is_on_the_page_and_nothing_else(namespace):
    listed = [row[0].strip("`") for row in rows(sections(DOCS / "api.md")[namespace])]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(importlib.import_module(namespace).__all__)


def test_every_name_on_the_page_has_one_line_of_its_own():
    table = [row for namespace in NAMESPACES for row in rows(sections(DOCS / "api.md")[namespace])]
    assert all(len(row) == 2 and 5 < len(row[1]) < 120 for row in table)


def test_every_attribute_of_a_report_is_on_the_page():
    methods = {"to_dict", "plot", "metrics", "undo", "at_least", "raise_if", "raise_if_different", "table"}
    for report, attributes in rows(sections(DOCS / "api.md")["What reports hold"]):
        public = {name for name in dir(getattr(precisebn, report.strip("`"))) if not name.startswith("_")}
        assert set(attributes.replace("`", "").split(", ")) == public - methods, report


def test_every_environment_variable_of_the_sources_is_on_the_page():
    sources = [DOCS.parent / "setup.py", *Path(precisebn.__file__).parent.rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"environ\S*[\"'](\w+)[\"']", path.read_text())}
    named = {row[0].strip("`"): row[1] for row in rows(sections(DOCS / "api.md")["Environment variables"])}
    known = {name for name in read if name.startswith("PRECISEBN_")}
    others = {"CUDA_HOME", "CXX", "TORCH_CUDA_ARCH_LIST"}
    assert known == set(named) - others
    assert len(known) == 4
    assert others <= read | {"CXX"}
    assert "CXX" in (DOCS.parent / "setup.py").read_text()


def test_modules_of_ones_own_and_the_kinds_of_state_are_as_the_page_says():
    for name, _ in rows(sections(DOCS / "api.md")["For modules of your own"]):
        room, _, name = name.strip("`").rpartition(".")
        assert name in importlib.import_module(f"precisebn.{room}").__all__
    kinds = re.search(r"\*\*`kinds=`\*\*(.*?);", (DOCS / "api.md").read_text(), flags=re.DOTALL)[1]
    assert set(re.findall(r'"(\w+)"', kinds)) == set(importlib.import_module("precisebn.state.entries").KINDS)


def test_the_code_of_the_page_of_names_runs():
    namespace: dict[str, object] = {}
    torch.manual_seed(0)
    for block in blocks(DOCS / "api.md"):
        exec(compile(block, "docs/api.md", "exec"), namespace)


def test_what_the_page_says_of_a_slice_is_so():
    """A slice of a container is a new one: converting it alone leaves the model as it was."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    convert_frozen_batchnorm(model[:2])
    assert type(model[1]) is nn.BatchNorm2d
    convert_frozen_batchnorm(model, include=model[:2])
    assert type(model[1]) is FrozenBatchNorm2d
    assert type(model[3]) is nn.BatchNorm2d


def test_the_code_of_the_page_of_many_ranks_runs(tmp_path):
    """As its reader runs it: on two ranks, by the command that it names."""
    processes.skip_without_gloo()
    page = DOCS / "distributed.md"
    arguments = re.search(r"`torchrun (.*?) script\.py`", page.read_text())[1].split()
    assert arguments == ["--nproc-per-node", "2"]
    (tmp_path / "script.py").write_text("\n".join(blocks(page)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(DOCS.parent), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on 2 ranks: all equal") == 1 + 2, done.stdout  # by log=print once, by print on each


PAGES = ("api", "design", "distributed", "migration", "modules", "scaling", "state")


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}.md" for name in PAGES)])
def test_links_lead_somewhere(page):
    path = DOCS.parent / page
    links = re.findall(r"\]\(([^)]+)\)", path.read_text())
    for link in (link for link in links if not link.startswith("https://")):
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def headings(page: Path) -> set[str]:
    return {re.sub(r"[^\w ]", "", line.lower()).strip().replace(" ", "-") for line in page.read_text().splitlines()}


# ---- docs/migration.md ----------------------------------------------------------------------------------------------


class World(dict[str, object]):
    """The names that the page uses: a model, data for it, an average of it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        model = nn.Sequential(stem, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        data = [(torch.randn(4, 3, 8, 8), torch.zeros(4).long())] * 256
        super().__init__(
            precisebn=precisebn,
            torch=torch,
            model=model,
            loader=data[:200],
            images=data[0][0],
            batches=[{"inputs": images, "data_samples": [None] * 4} for images, _ in data],
            ema=torch.optim.swa_utils.AveragedModel(model, use_buffers=True).eval(),
        )


SETUP = {
    'precisebn.unfreeze(model, "0")': 'precisebn.freeze(model, "0")',
    "report.undo()": "report = precisebn.update_bn_stats(model, loader, 100)",
    "precisebn.nn.batch_unshuffle(keys, shuffle, distributed=True)": (
        "keys, shuffle = precisebn.nn.batch_shuffle(images, distributed=True)"
    ),
}
"""What a reader has called before some of the replacements."""


def replacements() -> list[tuple[str, str, str]]:
    page = sections(DOCS / "migration.md")
    return [(library, *row) for library, text in page.items() for row in rows(text)]


REPLACEMENTS = [pytest.param(*row, id=f"{row[0]}: {row[1]}") for row in replacements()]


@pytest.mark.parametrize(("library", "theirs", "ours"), REPLACEMENTS)
def test_what_to_call_here_runs(library, theirs, ours, request):
    assert re.fullmatch(r"`[^`]+`", ours)
    world = World()
    for peer in ("timm", "torchvision"):
        if f"{peer}." in ours:
            world[peer] = request.getfixturevalue(peer)
    call = ours.strip("`")
    exec(SETUP.get(call, ""), world)
    eval(call, world)


def test_what_is_set_up_before_is_still_called_for():
    assert set(SETUP) <= {ours.strip("`") for _, _, ours in replacements()}


def test_the_hooks_of_the_page_recalibrate(monkeypatch):
    """In trainers as small as can be, which have what the hooks ask for: the real ones are seldom installed."""
    stand_in("detectron2.engine", monkeypatch, HookBase=type("HookBase", (), {}))
    stand_in("detectron2.utils.events", monkeypatch, EventStorage=contextlib.nullcontext)
    stand_in("mmengine.hooks", monkeypatch, Hook=type("Hook", (), {}))
    namespace: dict[str, object] = {}
    for block in blocks(DOCS / "migration.md"):
        exec(compile(block, "docs/migration.md", "exec"), namespace)

    world = World()
    hook = namespace["PreciseBN"](10, world["model"], world["loader"], 4)
    for step, is_time in ((7, False), (9, True), (10, False), (11, True)):
        hook.trainer = SimpleNamespace(iter=step, max_iter=12)
        hook.after_step()
        assert world["model"][2].num_batches_tracked == 4 * is_time
        world["model"][2].num_batches_tracked.zero_()

    class Preprocessed(nn.Sequential):
        def data_preprocessor(self, batch, training):
            return {"inputs": batch["inputs"] / 255}

    model = Preprocessed(world["model"])
    for wrapped in (model, nn.DataParallel(model)):
        runner = SimpleNamespace(model=wrapped, train_dataloader=world["batches"])
        namespace["PreciseBNHook"](8).after_train_epoch(runner)
        assert world["model"][2].num_batches_tracked == 8
        world["model"][2].num_batches_tracked.zero_()


def stand_in(name: str, monkeypatch: pytest.MonkeyPatch, **names: object) -> None:
    """A module of that name, and its packages."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        monkeypatch.setitem(sys.modules, path, sys.modules.get(path) or ModuleType(path))
    vars(sys.modules[name]).update(names)


def test_a_wrapper_that_was_made_for_fvcore_says_what_to_do():
    """It takes the pair, and gets the images alone; the page and the note of the error name the same call."""

    class TakesThePair(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, batch):
            images, _ = batch
            return self.model(images)

    world = World()
    model = TakesThePair(world["model"])
    loader = [(torch.randn(2, 3, 8, 8), torch.zeros(2).long())] * 8
    call = "forward=lambda model, batch: model(batch)"
    assert f"`{call}`" in sections(DOCS / "migration.md")["fvcore"]
    with pytest.raises(ValueError, match=r"got shape \(8, 6, 6\)") as raised:
        precisebn.update_bn_stats(model, loader, 8)
    assert "forward=lambda model, batch: model(*batch) or model(batch)" in str(raised.value.__notes__)
    eval(f"precisebn.update_bn_stats(model, loader, 8, {call})", world | {"model": model, "loader": loader})


@pytest.mark.parametrize(("library", "theirs", "ours"), REPLACEMENTS)
def test_what_was_called_is_there(library, theirs, ours, request):
    """In those of the libraries that are installed; the arguments are looked at by the eye alone."""
    called = re.match(r"`((\w+\.)+\w+)", theirs)
    if called is None:
        pytest.skip("no name of a library")
    path = called[1].split(".")
    if path[0] in ("timm", "torchvision"):
        request.getfixturevalue(path[0])
    elif path[0] == "fvcore":
        request.getfixturevalue("fvcore_bn")
    elif path[0] != "torch":
        pytest.importorskip(path[0], reason=f"{path[0]} is not installed")
    found = importlib.import_module(path[0])
    for depth, name in enumerate(path[1:], 2):
        if not hasattr(found, name):
            importlib.import_module(".".join(path[:depth]))
        found = getattr(found, name)
    assert callable(found)


@pytest.mark.parametrize("call", ["update_bn", "update_bn_stats"])
def test_the_same_statistics_as_theirs(call, fvcore_bn):
    """Where the page says that only the name changes, the result is the same: mini-batches of one size."""
    theirs, ours = World(), World()
    data = [torch.randn(8, 3, 8, 8) for _ in range(10)]
    if call == "update_bn":
        torch.optim.swa_utils.update_bn(data, theirs["ema"])
        precisebn.update_bn_stats(ours["ema"], data, None, modules="all", estimator="batch-mean")
        pairs = zip(theirs["ema"].buffers(), ours["ema"].buffers(), strict=True)
    else:
        fvcore_bn.update_bn_stats(theirs["model"], data, 10)
        precisebn.update_bn_stats(ours["model"], data, 10)
        pairs = zip(theirs["model"].buffers(), ours["model"].buffers(), strict=True)
    for a, b in pairs:
        if a.is_floating_point():
            torch.testing.assert_close(a, b)


def test_what_the_page_says_of_timms_functions_is_so(timm):
    """They pass frozen layers of ours over, and reparameterize_model stops at them, both without a word."""
    model = convert_frozen_batchnorm(nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))))
    timm.utils.unfreeze(model, ["0"])
    assert type(model[0][1]) is FrozenBatchNorm2d
    precisebn.convert_to_batchnorm(timm.layers.freeze_batch_norm_2d(model))
    assert type(model[0][1]) is nn.BatchNorm2d

    mobile = convert_frozen_batchnorm(timm.create_model("mobileone_s0").eval())
    with pytest.raises(AssertionError, match=r"^$"):
        timm.utils.reparameterize_model(mobile)


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList])
def test_a_slice_of_a_model_says_which_layers(container):
    model = (
        container([nn.BatchNorm2d(3) for _ in range(3)])
        if container is nn.ModuleList
        else container(*[nn.BatchNorm2d(3) for _ in range(3)])
    )
    convert_frozen_batchnorm(model, include=model[:2])
    assert [type(layer) for layer in model] == [FrozenBatchNorm2d, FrozenBatchNorm2d, nn.BatchNorm2d]
