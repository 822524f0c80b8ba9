"""load_rows: all files of a run as a stream of rows, with a report of what could not be used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from app.core.errors import ErrorKind, WeftError
from app.training.data_config import FIELDS, MOST_BAD_ROWS, BadRow, DataConfig, DataReport, FileReport
from app.training.formats import BadRowError, Row, make_row, recognise
from app.training.readers import find_files, read
from app.training.records import Record, Unreadable

_LOOKED_AT = 100  # rows from whose columns a format is recognised
KNOWN_FIELDS = {field for needed, optional in FIELDS.values() for field in (*needed, *optional)}


class Rows:
    """The rows that can be used, read anew each time one iterates; `report` is that of the iteration begun last.

    Equal rows are counted, and left out where the config says so. Memory: one row, and 16 bytes a row for the counting.
    """

    def __init__(self, config: DataConfig, files: list[Path], most: int = 0) -> None:
        self.config = config
        self.files = files
        self.most = most
        self.report = DataReport()

    def __iter__(self) -> Iterator[Row]:
        self.report = DataReport()
        seen: set[bytes] = set()
        for number, path in enumerate(self.files):
            if self.report.partial:
                return
            report = FileReport(file=str(path))
            self.report.files.append(report)
            try:
                yield from self._file(number, path, report, seen)
            except Unreadable as error:
                report.problem = str(error)

    def _file(self, number: int, path: Path, report: FileReport, seen: set[bytes]) -> Iterator[Row]:
        separator = self.config.separator.replace("\\n", "\n").replace("\\t", "\t")
        records = read(path, separator)
        head: list[Record] = []
        trouble: Unreadable | None = None
        try:
            head.extend(islice(records, _LOOKED_AT))
        except Unreadable as error:
            trouble = error
        columns = dict.fromkeys(name for record in head if record.value for name in record.value)
        for record in chain(head, records if trouble is None else ()):
            if self.most and self.report.rows >= self.most:
                self.report.partial = True
                return
            if record.value and not report.format:
                self._recognise(report, columns or record.value)
            row = self._row(number, record, report)
            if row is None:
                continue
            if not row.more:
                digest = row.digest()
                if digest in seen:
                    self.report.duplicates += 1
                    if self.config.duplicates == "drop":
                        continue
                seen.add(digest)
            report.kept += 1
            self.report.kept += 1
            yield row
        if trouble is not None:
            raise trouble
        if not report.rows:
            raise Unreadable("It is empty.")

    def _recognise(self, report: FileReport, columns: Iterable[str]) -> None:
        report.columns = tuple(str(name) for name in columns)[:100]
        report.format, report.mapping, problem = recognise(columns, self.config.format, self.config.mapping)
        if not report.format:
            raise Unreadable(problem)

    def _row(self, number: int, record: Record, report: FileReport) -> Row | None:
        report.rows += 1
        self.report.rows += 1
        problem = record.problem
        if record.value is not None and report.format:
            values = {field: record.value.get(column) for field, column in report.mapping.items()}
            try:
                row = make_row(report.format, values, self.config.system)
                row.file, row.line, row.more = number, record.line, record.more
                return row
            except BadRowError as error:
                problem = str(error)
        self.bad(report, record.line, problem or "It has no fields.")
        return None

    def bad(self, report: FileReport, line: int, reason: str) -> None:
        """Note a row that is kept out."""
        report.bad += 1
        self.report.bad += 1
        if len(self.report.bad_rows) < MOST_BAD_ROWS:
            self.report.bad_rows.append(BadRow(report.file, line, reason))


def load_rows(config: DataConfig, most: int = 0) -> Rows:
    """The rows of the files that a config names.

    Args:
        most: reading ends after so many rows; 0 reads all.

    Raises:
        WeftError: NOT_FOUND, BAD_INPUT, PERMISSION for files that are not there; while iterating, ENVIRONMENT when
            Parquet's library is missing. A file that cannot be read is told in the report, not raised.
    """
    unknown = set(config.mapping) - KNOWN_FIELDS
    if unknown:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"The mapping names {', '.join(sorted(unknown))}, which is no field of any format.",
            f"Fields are: {', '.join(sorted(KNOWN_FIELDS))}.",
        )
    return Rows(config, find_files(config.files), most)
