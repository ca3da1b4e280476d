"""Records found by their bytes are those that Python's own readers find, and leaving some out touches no other."""

import codecs
import csv
import io
import json

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from source_proj._io.records import csv_records, csv_rows, json_lines, json_rows

ENCODINGS = ["utf-8", "utf-8-sig", "latin-1", "cp1252", "utf-16-le", "utf-16-be", "utf-32-le", "shift_jis", "gbk"]
MARKS = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE, "utf-32-le": codecs.BOM_UTF32_LE}
LINES = st.sampled_from(["\n", "\r\n", "\r"])
# Letters, quotes, delimiters, every kind of line end that str.splitlines knows, and letters of several bytes.
WILD = st.text(st.sampled_from('ab",;\t \r\n\x0b\x0c\x1c\x85 é\u2028漢\x00'), max_size=24)
NARROW = st.text(st.sampled_from('ab",; \r\né'), max_size=24)


def rows_of(text, delimiter=","):
    return [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]


def encoded(text, encoding, marked):
    return (MARKS.get(encoding, b"") if marked else b"") + text.encode(encoding)


@given(WILD, st.sampled_from(["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le"]), st.booleans(), st.data())
@example('a"b,"c\n', "utf-8", False, None)
@example('"a" b"\n,c', "utf-8", False, None)
@example('"open\n1,2', "utf-16-le", True, None)
def test_csv_records_are_those_of_the_reader(text, encoding, marked, data):
    content = encoded(text, encoding, marked)
    records = csv_records(content, encoding=encoding, header=False)
    expected = rows_of(text)
    assert [rows_of(records.text(span)) for span in records.spans] == [[row] for row in expected]
    dropped = set() if data is None else data.draw(st.sets(st.integers(0, len(expected) - 1))) if expected else set()
    check_left_out(records, content, dropped)
    kept = [row for place, row in enumerate(expected) if place not in dropped]
    left = records.without(dropped)[records.mark :].decode(records.encoding)
    open_end = expected and len(expected) - 1 not in dropped and not text.endswith(("\r", "\n"))
    assert rows_of(left) == kept or not open_end


def check_left_out(records, content, dropped):
    """The bytes left are the original's without the dropped spans', one by one."""
    gone = {byte for place in dropped for byte in range(*records.spans[place])}
    assert records.without(dropped) == bytes(byte for place, byte in enumerate(content) if place not in gone)


@given(
    st.lists(st.lists(WILD.filter(lambda text: "\x00" not in text), min_size=2, max_size=3), min_size=1, max_size=6),
    LINES, st.booleans(), st.booleans(), st.data(),
)  # fmt: skip
def test_a_written_table_without_some_rows_is_the_table_of_the_others(table, line_end, all_quoted, ended, data):
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=line_end, quoting=csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL)
    writer.writerow([f"column {place}" for place in range(3)])
    writer.writerows(table)
    content = text.getvalue().encode()
    content = content if ended else content[: -len(line_end)]
    records = csv_records(content)
    if not all_quoted:  # the writer leaves a lone return unquoted, which its own reader takes for a line's end
        table = [row for row in rows_of(content.decode())[1:] if len(row) <= 3]
        assume(table and len(table) == len(records))
    dropped = data.draw(st.sets(st.integers(0, len(table) - 1)))
    left = records.without(dropped)
    kept = [row for place, row in enumerate(table) if place not in dropped]
    assert rows_of(left.decode())[1:] == kept
    assert len(records) == len(table)
    check_left_out(records, content, dropped)
    names = [f"column {place}" for place in range(3)]
    assert csv_rows(csv_records(left)) == [
        {**dict.fromkeys(names), **dict(zip(names, row, strict=False))} for row in kept
    ]


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(text=NARROW)
def test_letters_of_any_encoding_are_no_signs(encoding, text):
    text = text.replace("é", "é" if encoding in ("latin-1", "cp1252") or encoding.startswith("utf") else "表")
    records = csv_records(text.encode(encoding), encoding=encoding, header=False)
    assert [rows_of(records.text(span)) for span in records.spans] == [[row] for row in rows_of(text)]


@given(
    st.lists(st.fixed_dictionaries({"a": st.text(st.sampled_from('a"\\\n\r\u2028\x85漢'), max_size=6)}), max_size=5),
    st.sampled_from(["\n", "\r\n", "\n\n", "\r\n \n"]), st.booleans(), st.booleans(), st.booleans(), st.data(),
)  # fmt: skip
def test_lines_of_json_are_kept_byte_by_byte(objects, line_end, ended, marked, ascii_only, data):
    lines = [json.dumps(value, ensure_ascii=ascii_only) + line_end for value in objects]
    text = "".join(lines) if ended else "".join(lines).rstrip("\r\n")
    content = (codecs.BOM_UTF8 if marked else b"") + text.encode()
    records = json_lines(content)
    assert list(json_rows(records)) == objects
    dropped = data.draw(st.sets(st.integers(0, len(objects) - 1))) if objects else set()
    check_left_out(records, content, dropped)
    kept = [value for place, value in enumerate(objects) if place not in dropped]
    assert list(json_rows(json_lines(records.without(dropped)))) == kept


def test_what_is_no_record_is_named():
    with pytest.raises(IndexError, match="records 0 to 1, got 1 to 2"):
        csv_records(b"h\n1\n2\n").without([1, 2])
    with pytest.raises(ValueError, match="column 'a' is there twice"):
        csv_rows(csv_records(b"a,a\n1,2\n"))
    with pytest.raises(ValueError, match="record 2 has 3 fields and the header 2"):
        csv_rows(csv_records(b"a,b\n1,2\n1,2,3\n"))
    with pytest.raises(ValueError, match="first line must name the columns"):
        csv_rows(csv_records(b"\n\r\n"))
    with pytest.raises(ValueError, match="line 3 is no JSON object"):
        list(json_rows(json_lines(b'{"a": 1}\n\n[\n')))
    with pytest.raises(ValueError, match="byte 5 is no utf-8"):
        csv_rows(csv_records(b"a\nb\nc\xff\n"))


@pytest.mark.parametrize("delimiter", ["", ",,", '"', "\n", "é"])
def test_a_delimiter_is_one_sign(delimiter):
    with pytest.raises(ValueError, match="a delimiter is one sign"):
        csv_records(b"", delimiter=delimiter)


@pytest.mark.parametrize("encoding", ["iso2022_jp", "utf-7", "hz", "cp500", "base64", "no such"])
def test_encodings_in_which_bytes_of_signs_are_letters_are_refused(encoding):
    with pytest.raises(ValueError, match=r"cannot be found in|no encoding of texts"):
        csv_records(b"a,b\n", encoding=encoding)


def test_a_text_of_wide_letters_that_was_cut_is_refused():
    with pytest.raises(ValueError, match="it was cut, or is damaged"):
        csv_records("a\nb\n".encode("utf-16")[:-1])


@pytest.mark.parametrize("line", [b"[[1, 2]]", b"3", b"null", b"[" * 100_000])
def test_a_line_that_is_no_object_is_named(line):
    with pytest.raises(ValueError, match="line 2 is no JSON object"):
        list(json_rows(json_lines(b'{"a": 1}\n' + line + b"\n")))


def test_long_fields_are_read_whole():
    limit = csv.field_size_limit()
    long = "x" * (limit + 1)
    rows = csv_rows(csv_records(f'a,b\n1,"{long}"\n2,y\n'.encode()))
    assert [row["b"] for row in rows] == [long, "y"]
    assert csv.field_size_limit() == limit


def test_a_broken_line_has_one_number():
    with pytest.raises(ValueError, match=r"^line 2 is no JSON object: [^\d]*, column \d+$"):
        list(json_rows(json_lines(b'{"a": 1}\n{"a": 1,\n', encoding="utf-8")))
