import datasets
import pytest

from diffusers_dtr.training.data.captions import CaptionedDataset, Captions


class Rows(list):
    """Samples that tell their place and no more."""

    def __getitem__(self, item: tuple[int, int]) -> dict:
        return {"epoch": item[0], "index": item[1]}


LETTERS = [["a", "b", "c", "d"]]


def captions(*rows) -> Captions:
    return Captions(datasets.Dataset.from_dict({"text": list(rows)}), "text")


def drawn(rows: Captions, epochs: range, count: int, **options) -> list[str]:
    dataset = CaptionedDataset(Rows(range(count)), rows, **options)
    return [dataset[epoch, index]["caption"] for epoch in epochs for index in range(len(dataset))]


@pytest.mark.parametrize("rows", [("one", "two"), (["one"], ["two", "three"])])
def test_a_row_has_one_or_several_captions_whatever_the_format_of_the_dataset(rows):
    dataset = datasets.Dataset.from_dict({"text": list(rows)})
    expected = [[row] if isinstance(row, str) else row for row in rows]
    for given in (dataset, dataset.with_format("numpy")):
        found = Captions(given, "text")
        assert [found[row] for row in range(2)] == expected
        assert list(found.all()) == [*expected[0], *expected[1]]


@pytest.mark.parametrize("missing", [None, [], ["one", None]])
def test_a_row_without_a_caption_is_named(missing):
    whole = "one" if missing is None else ["one"]
    with pytest.raises(ValueError, match=r"`caption_column` must have a caption in every row, got .* in row 2"):
        captions(whole, whole, missing)


def test_a_column_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"`caption_column` must hold strings .* got 'text', which holds Value"):
        captions(1, 2)


def test_each_of_a_rows_captions_is_drawn_about_equally_often():
    counts = [drawn(captions(*LETTERS), range(2000), 1, seed=0).count(letter) for letter in "abcd"]
    assert all(abs(count - 500) < 100 for count in counts)  # five standard deviations


def test_a_caption_depends_on_its_place_and_seed_alone():
    rows = captions(*LETTERS * 20)
    seeds_and_epochs = [(1, 0), (1, 1), (2, 0)]
    first, again = (
        [tuple(drawn(rows, range(epoch, epoch + 1), 20, seed=seed)) for seed, epoch in seeds_and_epochs]
        for _ in range(2)
    )
    assert first == again
    assert len(set(first)) == 3


def test_the_asked_for_share_is_empty_and_the_rest_is_drawn_as_without():
    rows = captions(*LETTERS * 10)
    some = drawn(rows, range(400), 10, seed=0, proportion_empty=0.1)
    assert abs(some.count("") - 400) < 95  # five standard deviations
    without = drawn(rows, range(400), 10, seed=0)
    assert all(one in ("", other) for one, other in zip(some, without, strict=True))


def test_without_a_seed_every_row_has_its_first_caption():
    assert drawn(captions(["a", "b"], ["c", "d"]), range(3), 2) == ["a", "c"] * 3
