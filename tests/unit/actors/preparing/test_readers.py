"""Sources in their four forms: the same pictures come out of each, slices cover everything once, and damage is named."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from actors.prepared import Broken
from actors.preparing.readers import Columns, Reader, Record, Slice, fingerprint, make_reader
from actors.sources.example import SourceError
from tests.mixed_clips import encoded as encoded_clip
from tests.mixed_clips import levels
from tests.mixed_pictures import encoded

ROWS = [{"text": f"gradient {number}", "data": encoded(number)} for number in range(23)]


def as_folder(path: Path) -> Path:
    path.mkdir()
    lines = []
    for number, row in enumerate(ROWS):
        (path / f"{number}.png").write_bytes(row["data"])
        lines.append(json.dumps({"file_name": f"{number}.png", "text": row["text"]}) + "\n" * (1 + number % 2))
    (path / "metadata.jsonl").write_text("".join(lines))
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def as_tars(path: Path, folder: str = "") -> Path:
    path.mkdir()
    for start in (0, 9, 18):
        with tarfile.open(path / f"shard-{start:04d}.tar", "w") as tar:
            for number, row in list(enumerate(ROWS))[start : start + 9]:
                add(tar, f"{folder}{number:06d}.png", row["data"])
                add(tar, f"{folder}{number:06d}.seg.png", b"a mask")
                if number % 2:
                    add(tar, f"{folder}{number:06d}.txt", row["text"].encode() + b"\n")
                else:
                    add(tar, f"{folder}{number:06d}.json", json.dumps({"caption": row["text"], "width": 3}).encode())
    return path


def as_parquet(path: Path) -> Path:
    path.mkdir()
    table = pa.table({"caption": [row["text"] for row in ROWS], "image": [{"bytes": row["data"], "path": None} for row in ROWS], "score": [0.5] * len(ROWS)})
    parquet.write_table(table.slice(0, 15), path / "a.parquet", row_group_size=6)
    parquet.write_table(table.slice(15), path / "b.parquet")
    return path


def as_arrow(path: Path) -> Path:
    """As `datasets.DatasetDict.save_to_disk` writes it: a folder a split, streams of record batches."""
    for split, start, end in (("test", 0, 5), ("train", 5, 23)):
        (path / split).mkdir(parents=True)
        table = pa.table({"image": [{"bytes": row["data"], "path": "x.png"} for row in ROWS[start:end]], "text": [row["text"] for row in ROWS[start:end]]})
        file = path / split / "data-00000-of-00001.arrow"
        with pa.ipc.new_stream(str(file), table.schema) as stream:
            stream.write_table(table, max_chunksize=4)
        (path / split / "cache-0123456789abcdef.arrow").write_bytes(file.read_bytes())  # as a `map` leaves it
        (path / split / "state.json").write_text(json.dumps({"_data_files": [{"filename": file.name}], "_fingerprint": "x"}))
    (path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return path


FORMS = {"folder": as_folder, "tars": as_tars, "parquet": as_parquet, "arrow": as_arrow}


def everything(reader: Reader, rows: int) -> list[Record | Broken]:
    """All that the source holds, read slice by slice the way workers do."""
    found: list[Record | Broken] = []
    for piece in reader.plan(rows):
        if isinstance(piece, Broken):
            found.append(piece)
            continue
        read = list(pickle.loads(pickle.dumps(reader)).read(piece))
        assert len(read) == piece.rows <= rows
        found += read
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 4, 7, 100])
def test_slices_hold_everything_once_and_in_order(form: str, rows: int, tmp_path: Path) -> None:
    found = everything(make_reader(FORMS[form](tmp_path / "source"), Columns()), rows)
    assert all(isinstance(one, Record) for one in found), found
    records = [one for one in found if isinstance(one, Record)]
    assert [(one.text, one.id, one.data) for one in records] == [(row["text"], row["text"], row["data"]) for row in ROWS]
    assert len({one.name for one in records}) == len(ROWS)


@pytest.mark.parametrize("form", FORMS)
def test_slices_can_be_read_in_any_order(form: str, tmp_path: Path) -> None:
    reader = make_reader(FORMS[form](tmp_path / "source"), Columns())
    pieces = [piece for piece in reader.plan(3) if isinstance(piece, Slice)]
    backwards = [list(reader.read(piece)) for piece in reversed(pieces)]
    assert [list(reader.read(piece)) for piece in pieces] == backwards[::-1]


def test_one_file_is_a_source_too(tmp_path: Path) -> None:
    tars = as_tars(tmp_path / "tars", folder="some/folder.with.dots/")
    assert len(everything(make_reader(tars / "shard-0009.tar", Columns()), 4)) == 9
    assert len(everything(make_reader(as_parquet(tmp_path / "p") / "b.parquet", Columns()), 4)) == 8


def test_a_row_may_name_itself(tmp_path: Path) -> None:
    """Its id decides the split; otherwise the caption does."""
    parquet.write_table(pa.table({"image": [b"x", b"y"], "text": ["same", "same"], "id": [7, None]}), tmp_path / "t.parquet")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        add(tar, "a.jpg", b"x")
        add(tar, "a.json", b'{"text": "same", "id": "n1"}')
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "p.png", "text": "same", "id": "f1"}\n')
    (tmp_path / "p.png").write_bytes(b"x")

    def ids(source: Path) -> list[str]:
        return [one.id for one in everything(make_reader(source, Columns()), 9) if isinstance(one, Record)]

    assert ids(tmp_path / "t.parquet") == ["7", "same"]
    assert ids(tmp_path / "t.tar") == ["n1"]
    assert ids(tmp_path) == ["f1"]


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"pixels": [b"x"], "words": ["a"], "text": ["b"]}), file)
    with pytest.raises(SourceError, match=r"t\.parquet has no image column among image, .*; it has pixels, words, text: name one with --image"):
        everything(make_reader(file, Columns()), 4)
    with pytest.raises(SourceError, match="no text column wrods"):
        everything(make_reader(file, Columns("pixels", "wrods")), 4)
    assert [one.text for one in everything(make_reader(file, Columns("pixels", "words")), 4) if isinstance(one, Record)] == ["a"]


def faults(source: Path) -> dict[str, str]:
    return {one.name: one.reason for one in everything(make_reader(source, Columns()), 4) if isinstance(one, Broken)}


def test_lines_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    lines: list[Any] = [
        "not json",
        '"text"',
        '{"text": "no file"}',
        '{"file_name": "gone.png", "text": "a"}',
        '{"file_name": "a.png"}',
        '{"file_name": "a.png", "text": 5}',
    ]
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(lines))
    found = faults(tmp_path)
    assert list(found) == ["metadata.jsonl line 1", "metadata.jsonl line 3", "metadata.jsonl line 5", "gone.png", "a.png"]
    assert found["gone.png"] == "No such file or directory"
    assert found["a.png"] == "the caption is a int, not a text"


def test_samples_that_lack_something_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        add(tar, "1.txt", b"a caption alone")
        add(tar, "2.png", b"x")
        add(tar, "3.png", b"x")
        add(tar, "3.json", b"{")
        add(tar, "4.png", b"x")
        add(tar, "4.txt", b"\xff\xfe")
        add(tar, "5.png", b"x")
        add(tar, "5.txt", b"good")
    found = faults(tmp_path)
    assert [name.partition(":")[2] for name in found] == ["1", "2", "3", "4"]
    assert found["t.tar:1"] == "no picture among its files (txt)"
    assert found["t.tar:2"] == "no caption"


@pytest.mark.parametrize("damage", ["cut in a picture", "cut in a header", "a header overwritten", "no tar at all"])
def test_a_damaged_tar_gives_what_it_can_and_is_named(damage: str, tmp_path: Path) -> None:
    file = as_tars(tmp_path / "tars") / "shard-0009.tar"
    data = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        sixth = [member for member in tar.getmembers() if member.name.endswith("png") and "seg" not in member.name][5]
    if damage == "a header overwritten":
        data[sixth.offset : sixth.offset + 512] = b"\x55" * 512
    file.write_bytes(
        {"cut in a picture": data[: sixth.offset_data + 9], "cut in a header": data[: sixth.offset + 99], "no tar at all": b"no tar " * 500}.get(damage, data)
    )
    found = everything(make_reader(tmp_path / "tars", Columns()), 4)
    lost = [one for one in found if isinstance(one, Broken)]
    assert [one.name for one in lost] == ["shard-0009.tar"]
    kept = 0 if damage == "no tar at all" else 5
    assert f"unreadable after {kept} samples" in lost[0].reason or damage == "cut in a header"
    assert len(found) - 1 in (len(ROWS) - 9 + kept, len(ROWS) - 9 + kept - 1)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_damaged_table_is_named(form: str, tmp_path: Path) -> None:
    source = FORMS[form](tmp_path / "source")
    file = sorted(source.rglob(f"*.{form}"))[-1]
    file.write_bytes(file.read_bytes()[:-300])
    found = faults(source)
    assert list(found) == [str(file.relative_to(source))]
    assert "unreadable after" in found[str(file.relative_to(source))]


def test_damage_inside_a_table_costs_its_rows_and_no_others(tmp_path: Path) -> None:
    """The footer says what there is; the pages of the second row group are noise."""
    source = as_parquet(tmp_path / "source")
    data = bytearray((source / "a.parquet").read_bytes())
    column = parquet.ParquetFile(source / "a.parquet").metadata.row_group(1).column(1)
    start, length = column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size
    data[start : start + length] = b"\x55" * length
    (source / "a.parquet").write_bytes(data)
    found = everything(make_reader(source, Columns()), 4)
    assert len(found) == len(ROWS)
    lost = [one.name for one in found if isinstance(one, Broken)]
    assert lost == [f"a.parquet row {number}" for number in range(6, 12)]


def test_rows_without_a_picture_are_named(tmp_path: Path) -> None:
    images = [{"bytes": b"x", "path": None}, None, {"bytes": None, "path": "gone.png"}, {"bytes": None, "path": "there.png"}]
    (tmp_path / "there.png").write_bytes(b"there")
    parquet.write_table(pa.table({"image": images, "text": ["a", "b", "c", "d"]}), tmp_path / "t.parquet")
    found = everything(make_reader(tmp_path, Columns()), 3)
    assert [type(one) for one in found] == [Record, Broken, Broken, Record]
    assert found[1] == Broken("t.parquet row 1", "no picture")
    assert isinstance(found[3], Record)
    assert found[3].data == b"there"


def test_what_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        make_reader(tmp_path / "none", Columns())
    with pytest.raises(SourceError, match="is no source of pictures: give a folder"):
        make_reader(tmp_path, Columns())
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(SourceError, match="does not name its data files"):
        make_reader(tmp_path, Columns())


def test_another_source_has_another_fingerprint(tmp_path: Path) -> None:
    source = as_folder(tmp_path / "source")
    pieces = list(make_reader(source, Columns()).plan(4))
    before = fingerprint(source, pieces)
    assert fingerprint(source, list(make_reader(source, Columns()).plan(4))) == before
    with (source / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "0.png", "text": "one more"}\n')
    assert fingerprint(source, list(make_reader(source, Columns()).plan(4))) != before


def test_clips_come_from_folders_tars_and_tables(tmp_path: Path) -> None:
    clips = [encoded_clip(levels(number, 3)) for number in range(3)]
    folder, tars, tables = (tmp_path / name for name in ("folder", "tars", "tables"))
    for path in (folder, tars, tables):
        path.mkdir()
    for number, data in enumerate(clips):
        (folder / f"{number}.mp4").write_bytes(data)
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{i}.mp4", "text": f"clip {i}"}) + "\n" for i in range(3)))
    with tarfile.open(tars / "a.tar", "w") as tar:
        for number, data in enumerate(clips):
            add(tar, f"{number:04d}.jpg", b"a thumbnail")
            add(tar, f"{number:04d}.mp4", data)
            add(tar, f"{number:04d}.txt", f"clip {number}".encode())
        add(tar, "0003.txt", b"a text alone")
    parquet.write_table(
        pa.table({"caption": [f"clip {i}" for i in range(3)] + ["none"], "video": [{"bytes": data, "path": None} for data in [*clips, None]]}),
        tables / "a.parquet",
    )
    for source in (folder, tars, tables):
        found = everything(make_reader(source, Columns(), clips=True), 2)
        assert [(one.text, one.data) for one in found if isinstance(one, Record)] == [(f"clip {i}", data) for i, data in enumerate(clips)], source
        assert [one.reason for one in found if isinstance(one, Broken)] == {folder: [], tars: ["no clip among its files (txt)"], tables: ["no clip"]}[source]
    with pytest.raises(SourceError, match="is no source of clips: give a folder"):
        make_reader(folder / "0.mp4", Columns(), clips=True)
