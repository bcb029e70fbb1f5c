"""Record batches of Arrow -> documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from llama_dist.data.rows import Document, Reading, Skipped, decoded, listed, make_document, shortened, too_long
from llama_dist.errors import UserError

# What pyarrow raises for content that it cannot read; OSError too, but then without a number.
BROKEN = (pa.ArrowException, ValueError, OSError, KeyError, MemoryError)
# Bytes are the same text before it is known to be UTF-8: one wrong byte must not cost the whole batch.
AS_BYTES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
    pa.binary(): pa.binary(),
    pa.large_binary(): pa.large_binary(),
    pa.binary_view(): pa.binary_view(),
}


def columns_of(schema: pa.Schema, path: str, reading: Reading) -> list[str]:
    """The columns that are needed, of a file with `schema`. Raises UserError where one is missing or holds no text."""
    wanted = [*reading.columns, *([reading.id] if reading.id is not None else [])]
    for name in wanted:
        if schema.names.count(name) != 1:
            found = "has more than one" if name in schema.names else "has no"
            raise UserError(f'{path}: {found} column "{name}"; it has {listed(schema.names)}; choose one of these')
        kind = schema.field(name).type
        if not (_is_text(kind) or _is_number(kind) and (reading.template is not None or name not in reading.columns)):
            raise UserError(f'{path}: the column "{name}" holds {shortened(str(kind))} and no text; choose another')
    name = reading.id_column(schema.names)
    usable = name is not None and schema.names.count(name) == 1
    if usable and name not in wanted and (_is_text(schema.field(name).type) or _is_number(schema.field(name).type)):
        wanted.append(str(name))
    return list(dict.fromkeys(wanted))


def documents_of(
    batch: pa.RecordBatch, where: Callable[[int], str], reading: Reading
) -> Iterator[Document | Skipped]:
    """The documents of a batch of needed columns; `where` names its row i. A broken batch is one Skipped."""
    try:
        columns = {name: _readable(batch.column(name)) for name in batch.schema.names}
    except BROKEN as error:
        yield broken(where(0), error, batch.num_rows)
        return
    for row in range(batch.num_rows):
        values = {name: _value(column[row], where(row), reading) for name, column in columns.items()}
        wrong = next((value for name in reading.columns if isinstance(value := values[name], Skipped)), None)
        if wrong is None:
            kept = {name: value for name, value in values.items() if not isinstance(value, Skipped)}
            yield make_document(kept, where(row), reading)
        else:
            yield wrong


def broken(where: str, error: Exception, rows: int = 1) -> Skipped:
    """What an exception of BROKEN means for `rows` rows. Raises it again where it is not about the content."""
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno is not None):
        raise error
    reason = f"the file is broken here ({shortened(str(error) or type(error).__name__)})"
    return Skipped(where, reason, "file", count=max(rows, 1))


def _readable(column: pa.Array) -> pa.Array:
    """The column as bytes or numbers whose every offset has been checked: wrong ones would read foreign memory."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if isinstance(column, pa.DictionaryArray):
        # Only the dictionary is looked through here; validating checks that the indices are within it.
        column = pa.DictionaryArray.from_arrays(column.indices, _readable(column.dictionary), safe=False)
    elif column.type in AS_BYTES:
        column.validate()
        column = column.view(AS_BYTES[column.type])
    column.validate(full=True)
    return column


def _value(scalar: pa.Scalar, where: str, reading: Reading) -> Any:
    if isinstance(scalar, pa.DictionaryScalar):
        scalar = scalar.value
    if not isinstance(scalar, pa.BinaryScalar):
        return scalar.as_py()
    if not scalar.is_valid:
        return None
    content = scalar.as_buffer()
    if content.size > reading.max_document_bytes:
        return too_long(where, reading)
    return decoded(memoryview(content).tobytes(), where)


def _is_text(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in AS_BYTES or pa.types.is_null(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)
