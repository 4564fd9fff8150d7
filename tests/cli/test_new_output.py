"""What commands write is there whole or not at all, and never over what is there."""

import pytest

from diffusers_dtr.cli.outputs import new_output


def test_what_somebody_else_wrote_meanwhile_is_not_written_over(tmp_path):
    path = tmp_path / "grid.png"

    def write():
        with new_output(path) as partial:
            partial.write_text("ours")
            path.write_text("theirs")

    with pytest.raises(ValueError, match="exists already"):
        write()
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_what_is_there_is_refused_before_work(there, tmp_path):
    path = tmp_path / "output"
    {"file": path.touch, "folder": path.mkdir, "link": lambda: path.symlink_to(tmp_path / "nowhere")}[there]()
    with pytest.raises(ValueError, match="exists already"):
        new_output(path).__enter__()
