"""Whether something can be written is found by trying, and leaves nothing behind."""

from __future__ import annotations

import pytest

from sana_jax.errors import UserError
from sana_jax.files import check_can_write


def test_an_output_that_can_be_written_leaves_nothing(tmp_path):
    (tmp_path / "frames").mkdir()
    for name in ("x.png", "new/folder/x.png", "frames/", "new/"):
        check_can_write(f"{tmp_path}/{name}")
    assert [path.name for path in tmp_path.rglob("*")] == ["frames"]


@pytest.mark.parametrize("name", ["file/x.png", "file/new/x.png", "file/"])
def test_what_lies_below_a_file_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to --output \(.*/file is a file, not a folder\)"):
        check_can_write(f"{tmp_path}/{name}", "to --output")
