"""Files are whole at any time, whatever ends the writing."""

import pytest

from aura_dist.files import replacing, write_whole


def test_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "table.csv"
    write_whole(path, "é\n")
    with replacing(path) as aside:
        aside.write_text("half")
        assert path.read_text(encoding="utf-8") == "é\n"
        assert aside.parent == path.parent, "a rename within a file system is one step"
        assert aside.name.startswith("."), "readers of a directory skip hidden files"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("table.csv", "half")]


@pytest.mark.parametrize("begun", [False, True])
def test_failed_writing_leaves_the_old_file_and_no_other(tmp_path, begun):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def stopped():
        with replacing(path) as aside:
            if begun:
                aside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("table.csv", "old")]


def test_place_that_cannot_be_written_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "table.csv", "text")
    (tmp_path / "directory").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "directory", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["directory"]
