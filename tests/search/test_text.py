"""Where text comes from: files and data sets that hold some, a split that shares nothing, stretches of exact length."""

import json

import numpy as np
import pytest

from moa.errors import InputError
from moa.search.text import TokenStream, default_text, split_text, text_from_dataset, text_from_files

TEXT = "The tide tables were printed every spring.\n\nThe harbour master corrected them by hand.\n\n" * 40


def test_files_are_joined_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("first, früh")
    (tmp_path / "a.txt").write_text("second")
    source = text_from_files([tmp_path / "b.txt", tmp_path / "a.txt"])
    assert source.text.split() == ["first,", "früh", "second"]
    assert "b.txt" in source.description


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b" \n\t", "empty"), (b"text\0more", "binary"), (b"caf\xe9", "UTF-8"), (None, "cannot read")],
)
def test_files_without_text_are_refused_by_name(tmp_path, content, reason):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("fine")
    if content is not None:
        bad.write_bytes(content)
    with pytest.raises(InputError, match=rf"bad\.txt.*{reason}|{reason}.*bad\.txt"):
        text_from_files([good, bad])


def test_no_file_or_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no text file"):
        text_from_files([])
    with pytest.raises(InputError, match="cannot read"):
        text_from_files([tmp_path])


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="datasets is not installed")


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "txt", "saved"])
def test_local_data_sets_give_their_rows_in_order(tmp_path, datasets, form):
    rows = [{"text": "one tide", "year": 1} for _ in range(3)] + [{"text": "last spring", "year": 2}]
    path = tmp_path / f"data.{form}"
    if form in ("json", "jsonl"):
        path.write_text("\n".join(map(json.dumps, rows)))
    elif form == "csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    elif form == "txt":
        path.write_text("\n".join(row["text"] for row in rows))
    else:
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(path)
    assert text_from_dataset(str(path)).text.split() == ["one", "tide"] * 3 + ["last", "spring"]


@pytest.mark.usefixtures("datasets")
def test_a_column_can_be_chosen_and_must_hold_text(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"question": "why", "answer": "because", "year": 1}))
    assert text_from_dataset(str(path), column="answer").text == "because"
    for column in (None, "year", "missing"):
        with pytest.raises(InputError, match="question, answer, year"):
            text_from_dataset(str(path), column=column)


@pytest.mark.usefixtures("datasets")
def test_data_sets_that_cannot_be_read_are_refused(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('{"text": "fine"}')
    with pytest.raises(InputError, match="split 'test'"):
        text_from_dataset(str(path), split="test")
    path.write_text('{"text": "cut o')
    with pytest.raises(InputError, match=r"data\.json"):
        text_from_dataset(str(path))
    with pytest.raises(InputError, match="owner/none"):
        text_from_dataset("owner/none")
    path.write_text('{"text": "  "}')
    with pytest.raises(InputError, match="no text"):
        text_from_dataset(str(path))


def test_parts_of_a_text_are_consecutive_and_share_nothing():
    text = default_text().text
    parts = split_text(text, (0.5, 0.25, 0.25))
    assert "".join(parts) == text
    assert [len(part) / len(text) for part in parts] == pytest.approx([0.5, 0.25, 0.25], abs=1e-3)
    assert all(part[0].isspace() for part in parts[1:]), "no word is cut"
    assert len(split_text(text, (0.5, 0.25))) == 2


@pytest.mark.parametrize("fractions", [(0.8, 0.3), (0.5, 0), (-0.1, 0.5)])
def test_shares_that_make_no_split_are_refused(fractions):
    with pytest.raises(InputError, match="split"):
        split_text(TEXT, fractions)


def test_stretches_have_the_asked_length_and_begin_with_a_paragraph(demo_model):
    stream = TokenStream.of(demo_model.tokenizer, TEXT)
    rng = np.random.default_rng(0)
    drawn = [stream.draw(100, rng) for _ in range(20)]
    assert {ids.shape for ids in drawn} == {(100,)}
    assert {demo_model.tokenizer.decode(ids).split()[1] for ids in drawn} == {"tide", "harbour"}
    assert len(stream.draw(len(stream.ids), rng)) == len(stream.ids)
    with pytest.raises(InputError, match=f"{len(stream.ids):,} tokens"):
        stream.draw(len(stream.ids) + 1, rng)
    with pytest.raises(InputError, match="0 tokens"):
        TokenStream.of(demo_model.tokenizer, "").draw(1, rng)
