"""Files of training sets, written without some of their records: every other byte stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from source_proj._errors import MismatchError
from source_proj._io.outputs import require_free, write_output, write_output_folder
from source_proj._io.records import TABLES, csv_delimiter, csv_records, json_lines
from source_proj.curate.kept import annotate, require_new, take

__all__ = ["require_writable", "write_kept"]

_DATASET_FILES = {"dataset_info.json", "state.json"}
_LINES = (".jsonl", ".ndjson")


def write_kept(
    source: Path,
    out: Path,
    dropped: np.ndarray,
    n: int,
    *,
    columns: Mapping[str, list[Any]] | None,
    overwrite: bool,
    encoding: str,
    delimiter: str,
) -> None:
    """Write a training set's file without some examples; see :meth:`source_proj.curate.Cleaning.write`.

    Args:
        source: the file or folder.
        out: where to write.
        dropped: positions of the records to leave out.
        n: how many records the file must have.
        columns: columns to add to all records, of which then none is left out.
        overwrite: whether what is at ``out`` is replaced.
        encoding: of a text file.
        delimiter: of a ``.csv`` file.

    Raises:
        MismatchError: the file has another number of records.
        FileExistsError: something is at ``out`` that may not be overwritten.
        FileNotFoundError: there is no such file.
        ValueError: the file is of an unknown kind, or to become one of another kind, or one lies within the other.
    """
    require_writable(source, out, annotated=columns is not None, overwrite=overwrite)
    if source.is_dir():
        _write_folder(source, out, dropped, n, columns, overwrite)
    elif source.suffix == ".parquet":
        _write_parquet(source, out, dropped, n, columns, overwrite)
    else:
        content = source.read_bytes()
        csv = source.suffix in TABLES
        records = (
            csv_records(content, encoding=encoding, delimiter=csv_delimiter(source, delimiter))
            if csv
            else json_lines(content, encoding=encoding)
        )
        _require_count(source, len(records), n)
        write_output(out, records.without(dropped.tolist()), overwrite=overwrite)


def require_writable(source: Path, out: Path, *, annotated: bool, overwrite: bool) -> None:
    """Refuse what :func:`write_kept` could not write, as far as the names tell.

    Args:
        source: the file or folder.
        out: where it shall be written.
        annotated: whether columns are to be added.
        overwrite: whether what is at ``out`` is replaced.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: as :func:`write_kept`.
    """
    if not source.exists():
        raise FileNotFoundError(f"the data set {str(source)!r} does not exist")
    _require_apart(source, out)
    _check_kinds(source, out, annotated=annotated)
    require_free(out, overwrite=overwrite, replaceable=_is_dataset_folder if source.is_dir() else Path.is_file)


def _require_apart(source: Path, out: Path) -> None:
    """Refuse an output within the source, which would spoil it, and one that the source lies in.

    Raises:
        ValueError: names both.
    """
    for inner, outer in ((out, source), (source, out)):
        if any(_is_same(parent, outer) for parent in inner.resolve().parents):
            raise ValueError(
                f"{str(out)!r} and the data set {str(source)!r} lie one within the other: give a path apart"
            )


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths are one place, whatever links and letter cases they are written with."""
    try:
        return one.samefile(other)
    except OSError:  # nothing is there
        return one == other.resolve()


def _check_kinds(source: Path, out: Path, *, annotated: bool) -> None:
    known = (*TABLES, *_LINES, ".parquet")
    if source.is_dir():
        if not _is_dataset_folder(source):
            raise ValueError(f"{str(source)!r} is no folder that a datasets.Dataset was saved to (save_to_disk)")
        return
    if source.suffix not in known:
        raise ValueError(f"{str(source)!r} must be a .csv, .tsv, .jsonl or .parquet file, or a folder of datasets")
    if out.suffix != source.suffix:
        raise ValueError(
            f"{str(out)!r} must end in {source.suffix}, as {str(source)!r} does: records are not converted"
        )
    if annotated and source.suffix != ".parquet":
        raise ValueError(
            f"new columns would change the records of {str(source)!r}: annotate a .parquet file or a folder of "
            "datasets, or take the table of to_pandas()"
        )


def _require_count(source: Path, count: int, n: int) -> None:
    if count != n:
        raise MismatchError(
            f"{str(source)!r} has {count} records and the training set {n} examples: give the file that the bank was "
            "built from"
        )


def _write_parquet(
    source: Path, out: Path, dropped: np.ndarray, n: int, columns: Mapping[str, list[Any]] | None, overwrite: bool
) -> None:
    """Row group by row group, so that memory does not depend on the file's size."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError('parquet files need pyarrow: pip install "source-proj[datasets]"') from error
    kept = np.ones(n, dtype=bool)
    kept[dropped if columns is None else []] = False
    with parquet.ParquetFile(source) as file:
        _require_count(source, file.metadata.num_rows, n)
        schema = file.schema_arrow
        if columns is not None:
            require_new(columns, schema.names)
            added = pa.table(dict(columns))
            for field in added.schema:
                schema = schema.append(field)

        def write(target: BinaryIO) -> None:
            start = 0
            with parquet.ParquetWriter(target, schema, compression=_compression(file)) as writer:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group)
                    stop = start + len(table)
                    if columns is None:
                        table = table.filter(pa.array(kept[start:stop]))
                    else:
                        for name in columns:
                            table = table.append_column(name, added[name].slice(start, len(table)))
                    writer.write_table(table.cast(schema), row_group_size=max(1, len(table)))
                    start = stop

        write_output(out, write, overwrite=overwrite)


def _compression(file: Any) -> str | dict[str, str]:
    """The codec of each column, as the file's first row group has them."""
    if not file.num_row_groups:
        return "snappy"
    group = file.metadata.row_group(0)
    chunks = [group.column(place) for place in range(group.num_columns)]
    return {chunk.path_in_schema: chunk.compression.lower().replace("uncompressed", "none") for chunk in chunks}


def _write_folder(
    source: Path, out: Path, dropped: np.ndarray, n: int, columns: Mapping[str, list[Any]] | None, overwrite: bool
) -> None:
    try:
        import datasets
    except ImportError as error:
        raise ImportError('folders of data sets need datasets: pip install "source-proj[datasets]"') from error
    data = datasets.load_from_disk(str(source))
    _require_count(source, len(data), n)
    kept = np.setdiff1d(np.arange(n), dropped)
    changed = take(data, kept, n, "train") if columns is None else annotate(data, columns, n, "train")
    write_output_folder(
        out, lambda folder: changed.save_to_disk(str(folder)), overwrite=overwrite, replaceable=_is_dataset_folder
    )


def _is_dataset_folder(path: Path) -> bool:
    """Whether a folder holds what ``datasets`` saved there, and nothing else."""
    if not path.is_dir():
        return False
    names = {file.name for file in path.iterdir()}
    return names >= _DATASET_FILES and all(name in _DATASET_FILES or name.endswith(".arrow") for name in names)
