"""A folder is there when it is complete, and never otherwise."""

import pytest

from pear.folders import whole_folder
from pear.io import WriteError


def test_a_folder_is_whole_or_not_there(tmp_path):
    target = tmp_path / "model"
    with whole_folder(target) as folder:
        (folder / "weights").write_text("old")
    for error, expected in ((OSError(28, "No space left on device"), WriteError), (KeyError("a bug"), KeyError)):
        with pytest.raises(expected), whole_folder(target) as folder:
            (folder / "weights").write_text("half")
            raise error
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (target / "weights").read_text() == "old"
