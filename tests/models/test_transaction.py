"""Changes that can be undone."""

from precisebn.models.transaction import Transaction


def test_several_items_under_one_note_come_back_and_new_ones_go():
    place = {"kept": 1, "changed": 2}
    changes = Transaction()
    changes.update(place, {"changed": 3, "new": 4})
    assert place == {"kept": 1, "changed": 3, "new": 4}
    changes.undo()
    assert place == {"kept": 1, "changed": 2}
    assert list(place) == ["kept", "changed"]
