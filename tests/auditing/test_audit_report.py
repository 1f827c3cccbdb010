"""AuditReport: as a table, as data, by code, and as an exception."""

import json
import pickle

import pytest
from torch import nn

from precisebn import AuditError, AuditReport, Finding, InputError, audit
from precisebn.auditing.grouping import grouped

pytestmark = pytest.mark.usefixtures("one_thread")


def finding(code: str = "PBN101", severity: str = "error", layers: tuple[str, ...] = ("1",), **changes: str) -> Finding:
    said = {"title": "a title", "what": "Something happens.", "remedy": "call(this).", "source": "a paper", **changes}
    return Finding(code=code, severity=severity, layers=layers, **said)


REPORT = AuditReport(
    (finding(), finding("PBN101", "note"), finding("PBN203", "note", ())), {"PBN301": "needs optimizer="}, ("PBN102",)
)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


# ---- By code ---------------------------------------------------------------------------------------------------------


def test_findings_by_code():
    assert [one.severity for one in REPORT["PBN101"]] == ["error", "note"]
    assert REPORT["PBN102"] == ()
    assert "PBN101" in REPORT
    assert "PBN102" not in REPORT
    assert [one.code for one in REPORT] == ["PBN101", "PBN101", "PBN203"]
    assert len(REPORT) == 3


def test_a_check_that_was_not_run_has_no_answer():
    with pytest.raises(KeyError, match="PBN301 was not run: needs optimizer="):
        REPORT["PBN301"]
    with pytest.raises(KeyError, match="no check 'PBN103' was asked for; did you mean"):
        REPORT["PBN103"]


def test_it_is_true_where_something_was_found():
    assert REPORT
    assert not AuditReport((), {}, ("PBN101",))


# ---- As an exception -------------------------------------------------------------------------------------------------


def test_raise_if():
    with pytest.raises(AuditError, match=r"^1 finding that is an error:\nseverity  code"):
        REPORT.raise_if()
    with pytest.raises(AuditError, match="3 findings that are notes or graver:") as raised:
        REPORT.raise_if("note")
    assert "PBN203" in str(raised.value)
    assert "checks)" not in str(raised.value)  # it would count those with findings, and not those that were run
    AuditReport(REPORT.findings[1:], {}).raise_if("warning")
    with pytest.raises(InputError, match="severity 'fatal' must be one of 'note', 'warning', 'error'"):
        REPORT.raise_if("fatal")


# ---- As data ---------------------------------------------------------------------------------------------------------


def test_to_dict_is_json_and_has_all_of_it():
    data = json.loads(json.dumps(REPORT.to_dict()))
    assert data["findings"][0] == {
        "code": "PBN101", "severity": "error", "title": "a title", "layers": ["1"], "what": "Something happens.",
        "remedy": "call(this).", "source": "a paper",
    }  # fmt: skip
    assert data["not_run"] == {"PBN301": "needs optimizer="}
    assert data["passed"] == ["PBN102"]


def test_it_goes_through_pickle():
    assert pickle.loads(pickle.dumps(REPORT)) == REPORT


# ---- As a table ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("narrow")
def test_the_table():
    assert str(REPORT).splitlines() == [
        "1 error, 2 notes (3 checks)",
        "severity  code    where  what happens, and what to do",
        "error     PBN101  1      Something happens.",
        "                         -> call(this).",
        "note      PBN101  1      Something happens.",
        "                         -> call(this).",
        "note      PBN203         Something happens.",
        "                         -> call(this).",
        "not run: PBN301: needs optimizer=",
    ]
    assert repr(REPORT) == "<AuditReport: 1 error, 2 notes (3 checks)>"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_is_as_wide_as_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    long = finding(
        layers=("backbone.stage.a_module_with_a_long_name.norm.of.its.own", "1"), what="It happens again. " * 20
    )
    lines = str(AuditReport((long,), {f"PBN{i}": "needs a batch= and a loss=" for i in range(101, 130)})).splitlines()
    assert width - 20 < max(map(len, lines)) <= width
    where, what = lines[1].index("where"), lines[1].index("what")
    cells = [
        (line[where:what].strip(), line[what:].strip()) for line in lines[2:] if not line.startswith(("not", "  P"))
    ]
    assert "".join(name for name, _ in cells) == "".join(long.layers)
    assert " ".join(text for _, text in cells).count("It happens again.") == 20


@pytest.mark.usefixtures("narrow")
def test_nothing_found():
    assert str(AuditReport((), {}, ("PBN101", "PBN102"))) == "nothing found (2 checks)"


def test_rich_shows_the_same():
    console = pytest.importorskip("rich.console")
    with open("/dev/null", "w") as nowhere:
        shown = console.Console(record=True, width=120, file=nowhere)
        shown.print(REPORT)
    text = shown.export_text()
    assert all(words in text for words in ("1 error, 2 notes", "PBN203", "Something happens.", "call(this).", "PBN301"))


def test_rich_cuts_nothing_off_in_a_narrow_terminal():
    """A remedy is there to be copied."""
    console = pytest.importorskip("rich.console")
    call = f"update_bn_stats(model,loader,modules={'backbone.' * 12!r})"
    with open("/dev/null", "w") as nowhere:
        shown = console.Console(record=True, width=80, file=nowhere)
        shown.print(AuditReport((finding(layers=("backbone." * 12,), remedy=call),), {}))
    text = shown.export_text()
    assert "…" not in text
    cells = [line.split("│")[4].strip() for line in text.splitlines() if line.count("│") == 5]
    assert call in "".join(cells)


def test_markup_in_names_is_shown_as_it_is():
    console = pytest.importorskip("rich.console")
    with open("/dev/null", "w") as nowhere:
        shown = console.Console(record=True, width=120, file=nowhere)
        shown.print(AuditReport((finding(layers=("bn[0]", "bn[red]")),), {}))
    assert "bn[red]" in shown.export_text()


# ---- Many names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([], []),
        (["bn"], ["bn"]),
        ([""], ["(the model)"]),
        (["0.bn1", "1.bn1"], ["0.bn1", "1.bn1"]),
        (["0.bn1", "1.bn1", "2.bn1", "3.bn1"], ["0.bn1", "1.bn1", "2.bn1", "3.bn1"]),
        ([f"{i}.bn1" for i in range(5)], ["*.bn1 (5)"]),
        ([*(f"layer1.{i}.bn1" for i in range(4)), "bn1"], ["layer1.*.bn1 (4)", "bn1"]),
        (
            [f"{c}.conv_{i}x{i}.bn" for c in "st" for i in (1, 3, 5)],
            [f"{c}.conv_{i}x{i}.bn" for c in "st" for i in (1, 3, 5)],
        ),
        ([f"bn[{i}]" for i in range(6)], [f"bn[{i}]" for i in range(6)]),
    ],
)
def test_names_in_groups(names, shown):
    assert grouped(names) == shown


def test_a_resnet_fits_in_a_few_lines(torchvision):
    model = torchvision.models.resnet50()
    names = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert grouped(names) == ["bn*", "layer*.*.bn* (48)", "layer*.*.downsample.* (4)"] or len(grouped(names)) <= 5
    assert sum(int(line.partition("(")[2].rstrip(")") or 1) for line in grouped(names)) == len(names) == 53


def test_however_many_names_there_are_the_lines_are_few():
    names = [f"{'abcdefghijklmnopqrstuvwxyz'[i]}.bn" for i in range(20)]
    lines = grouped(names)
    assert (len(lines), lines[-1]) == (8, "... (13 more)")


def test_the_report_of_a_model_in_groups(torchvision):
    model = torchvision.models.resnet18()
    model.layer1.requires_grad_(False)
    report = audit(model, only="PBN101")
    assert report.findings[0].layers == ("layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1", "layer1.1.bn2")
    assert "layer1.1.bn2" in str(report)
