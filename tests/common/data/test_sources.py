import os

import pytest

from common.config import UserError
from common.data import sources
from common.data.folders import MAX_BYTES, find_photos
from common.data.photos import load_photos
from common.data.sources import find_queries, locate_photos, require_folder
from common.data.synthetic import draw_dataset, is_synthetic
from tests.common.data.files import tree


@pytest.fixture
def four_images(monkeypatch):
    """Synthetic data sets are small; how often one was drawn."""
    drawn = []

    def draw_four(folder):
        drawn.append(folder)
        return draw_dataset(folder, count=4)

    monkeypatch.setattr(sources.synthetic, "draw_dataset", draw_four)
    return drawn


def refuse(home):
    raise UserError("no network")


def test_auto_takes_the_photos_in_data(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.download, "download", refuse)
    tree(tmp_path, "mine/a/1.png", ".cache/b/1.png")
    assert locate_photos("auto", tmp_path) == tmp_path
    assert [path for path, _ in find_photos(tmp_path).photos] == ["mine/a/1.png"]


def test_auto_downloads_where_there_are_none(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(sources.download, "download", lambda home: asked.append(home) or home / "cats-and-dogs")
    assert locate_photos("auto", tmp_path) == tmp_path
    assert asked == [tmp_path]
    assert capsys.readouterr().out == ""


def test_auto_draws_synthetic_images_and_says_so_where_there_is_nothing_else(
    tmp_path, monkeypatch, capsys, four_images
):
    monkeypatch.setattr(sources.download, "download", refuse)
    folder = locate_photos("auto", tmp_path)
    assert is_synthetic(folder)
    out = capsys.readouterr().out
    assert "NO REAL PHOTOS: no network\n" in out
    assert "Continuing with synthetic images: the results say nothing about real photos." in out
    assert load_photos(folder).name == "synthetic cats and dogs 1"
    assert locate_photos("synthetic", tmp_path) == folder
    assert four_images == [folder]  # drawn once
    assert folder.parent == tmp_path / ".cache"  # where "auto" does not take them for the user's photos


def test_synthetic_images_on_request_are_drawn_without_a_word_about_real_ones(tmp_path, capsys, four_images):
    folder = locate_photos("synthetic", tmp_path / "data")
    assert capsys.readouterr().out == ""
    assert len(load_photos(folder)) == 4
    assert "left out" not in capsys.readouterr().out


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert locate_photos(str(tmp_path)) == require_folder(tmp_path) == tmp_path
    with pytest.raises(UserError, match="x is not a folder"):
        locate_photos(str(tmp_path / "x"))
    (tmp_path / "file.jpg").write_text("")
    with pytest.raises(UserError, match=r"file\.jpg is not a folder"):
        require_folder(tmp_path / "file.jpg")


def test_the_former_name_of_the_synthetic_images_gives_the_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^--data sample is called --data synthetic now$"):
        locate_photos("sample")
    tree(tmp_path / "sample", "a/1.png")
    assert locate_photos("sample").resolve() == tmp_path.resolve() / "sample"  # unless there is such a folder


def test_queries_are_files_folders_and_addresses(tmp_path, monkeypatch):
    folder = tree(tmp_path, "a.jpg", "some/b.png", "some/deeper/c.jpg")
    (folder / "some" / "notes.txt").write_text("x")
    (folder / "empty").mkdir()
    photo = (folder / "a.jpg").read_bytes()
    monkeypatch.setattr(sources, "fetch_photo", lambda address: photo if "d.jpg" in address else b"<html>")
    usable, unusable = find_queries((str(folder / "a.jpg"), str(folder / "some"), "HTTPS://example.org/d.jpg"))
    files = [str(folder / path) for path in ("a.jpg", "some/b.png", "some/deeper/c.jpg")]
    assert usable == dict.fromkeys(files) | {"HTTPS://example.org/d.jpg": photo}
    assert unusable == {}
    names = (*("missing.jpg", "empty", "some/notes.txt"), "http://example.org/page")
    usable, unusable = find_queries([name if "//" in name else str(folder / name) for name in names])
    assert usable == {}
    assert [reason.split(" (")[0] for reason in unusable.values()] == [
        "No such file or directory: name a photo, a folder of photos or an http(s) address",
        "this folder holds no photo",
        "not a photo",
        "not a photo",
    ]


def test_a_query_that_cannot_be_fetched_says_why(monkeypatch):
    def refuse(address):
        raise UserError("the server answered 404 Not Found")

    monkeypatch.setattr(sources, "fetch_photo", refuse)
    assert find_queries(("http://example.org/a.jpg",))[1] == {
        "http://example.org/a.jpg": "the server answered 404 Not Found"
    }


@pytest.mark.skipif(os.name == "nt", reason="pipes and devices")
def test_a_query_that_could_be_read_for_ever_is_refused(tmp_path):
    pipe, large = tmp_path / "pipe.jpg", tmp_path / "large.jpg"
    os.mkfifo(pipe)
    with large.open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    usable, unusable = find_queries([str(pipe), "/dev/zero", str(large)])
    what_to_do = "name a photo, a folder of photos or an http(s) address"
    assert not usable
    assert unusable == {
        str(pipe): f"a pipe, socket or device: {what_to_do}",
        "/dev/zero": f"a pipe, socket or device: {what_to_do}",
        str(large): f"larger than 1,000 MB: {what_to_do}",
    }
