import csv

import pytest

from common.config import UserError
from common.data.folders import Selection
from common.data.left_out import count_reasons, report_left_out
from common.data.photos import load_library, load_photos
from tests.common.data.files import DecodingConsumer, tree


def test_reasons_are_counted_with_the_first_of_each():
    reasons = {"b.jpg": "empty file", "c.txt": "not a photo", "a.jpg": "empty file", "d.jpg": "too large (9 x 9)"}
    assert count_reasons(reasons) == (
        "empty file (2, the first being a.jpg); not a photo (1, the first being c.txt); "
        "too large (1, the first being d.jpg)"
    )


@pytest.mark.parametrize("load", [load_photos, load_library])
def test_what_was_left_out_is_said_and_listed_and_adds_up(tmp_path, capsys, load):
    folder = tree(tmp_path / "mine", *(f"{name}/{number}.png" for name in "ab" for number in range(10)))
    (folder / "a" / "x.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("x")
    loaded = load(folder, [DecodingConsumer()], selection=Selection(("b/3.png",), lists=tmp_path / "results"))
    path = next((tmp_path / "results").glob("left_out-*-mine.csv"))
    rows = list(csv.reader(path.open()))
    assert rows == [
        ["path", "reason"],
        ["a/x.jpg", "empty file"],
        ["b/3.png", "excluded"],
        ["notes.txt", "not a photo"],
    ]
    assert len(loaded) + len(rows) - 1 == sum(each.is_file() for each in folder.rglob("*"))
    said = capsys.readouterr().out
    assert said.count(f"left out of {folder}: ") == 1
    for reason, first in (("empty file", "a/x.jpg"), ("excluded", "b/3.png"), ("not a photo", "notes.txt")):
        assert f"{reason} (1, the first being {first})" in said
    assert f"; all are listed in {path}" in said


def test_the_list_is_there_even_where_a_run_stops(tmp_path):
    folder = tree(tmp_path / "mine", "a/1.png", "b/1.png")
    (folder / "a" / "x.jpg").write_bytes(b"")
    selection = Selection(lists=tmp_path / "results")
    with pytest.raises(UserError, match=r"1 of 3 photos .*left_out-.*mine\.csv.*--allow-unreadable"):
        load_photos(folder, [DecodingConsumer()], selection=selection)
    assert "empty file" in next((tmp_path / "results").glob("left_out-*-mine.csv")).read_text()
    assert len(load_photos(folder, [DecodingConsumer()], selection=Selection(allow_unreadable=0.5))) == 2


def test_a_list_of_an_earlier_run_does_not_stay(tmp_path):
    assert report_left_out(tmp_path / "mine", {"x": "hidden"}, tmp_path).endswith("-mine.csv")
    assert report_left_out(tmp_path / "mine", {}, tmp_path) == ""
    assert list(tmp_path.glob("*.csv")) == []


def test_folders_of_the_same_name_have_lists_of_their_own(tmp_path):
    report_left_out(tmp_path / "a" / "mine", {"x": "hidden"}, tmp_path)
    report_left_out(tmp_path / "b" / "mine", {"y": "hidden"}, tmp_path)
    report_left_out(tmp_path / "c" / "mine", {}, tmp_path)
    assert len(list(tmp_path.glob("left_out-*-mine.csv"))) == 2
