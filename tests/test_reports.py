"""What reports have in common: tables whose columns line up, and values that JSON takes."""

import json
import math

from precisebn._reports import aligned, by_reason, counted, few, plain


def test_columns_line_up_and_those_without_content_are_left_out():
    rows = [("layer", "kind", "drift", "dead"), ("a.very.long.name", "mean", "1", ""), ("b", "var", "10.5", "")]
    assert aligned(rows, left=["kind"], least=7) == [
        "layer             kind    drift",
        "a.very.long.name  mean        1",
        "b                 var      10.5",
    ]
    assert aligned([]) == []


def test_names_and_counts_in_short():
    assert [counted(number, "layer") for number in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]
    assert [counted(number, "mini-batch") for number in (1, 2)] == ["1 mini-batch", "2 mini-batches"]
    assert [few("abcd"), few("abcde")] == ["a, b, c, d", "a, b, ..., e"]
    assert by_reason({"a": "frozen", "b": "lazy", "c": "frozen"}) == {"frozen": ["a", "c"], "lazy": ["b"]}


def test_plain_values_are_json_whatever_went_in():
    class Single(float):
        """As NumPy's float64 is."""

    values = plain({"a": (math.nan, Single(0.5), True), "b": {"c": [math.inf, None, 3]}})
    assert json.loads(json.dumps(values, allow_nan=False)) == {"a": [None, 0.5, True], "b": {"c": [None, None, 3]}}
    assert type(values["a"][1]) is float
