import numpy as np

from common.data.photos import load_library
from common.report.copies import report_copies
from common.retrieval.duplicates import Copies
from tests.common.data.files import tree


def test_groups_are_printed_where_their_files_cannot_be_written(tmp_path, capsys):
    photos = load_library(tree(tmp_path / "mine", "1.png", "2.png", "3.png"))
    copies = Copies([np.array([0, 2])], np.array([0.97, 0, 0.97], np.float32))
    (tmp_path / "file").write_text("")
    report_copies(photos, copies, tmp_path / "file" / "results")
    said = capsys.readouterr().out
    assert said.count("0.970") == 2
    assert "1 group of copies among 3 photos" in said
    assert "results can't be written: Not a directory" in said
    assert "\nwritten" not in said
    report_copies(photos, copies, tmp_path)
    said = capsys.readouterr().out
    for name in ("duplicates.csv", "duplicates.png"):
        assert f"written: {tmp_path / name}" in said
        assert (tmp_path / name).stat().st_size > 0
    report_copies(photos, Copies([], np.zeros(3, np.float32)), tmp_path)
    assert "no copies among 3 photos" in capsys.readouterr().out
    assert not (tmp_path / "duplicates.csv").exists()
