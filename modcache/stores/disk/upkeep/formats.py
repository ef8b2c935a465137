"""The files that rows are exported to: each format takes them a few megabytes at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from ....errors import UsageError
from ....rows import Layout, tensor_of
from ...index import KEY_BYTES

__all__ = ["FORMATS", "Part", "Rows"]

Rows = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]
"""Keys and rows, a line of bytes for each."""


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one layout.

    Args:
        layout: theirs.
        names: of their tensors; ``""`` for the only one.
        count: how many.
        rows: all of them, to be read once.
    """

    layout: Layout
    names: tuple[str, ...]
    count: int
    rows: Iterator[Rows]

    @property
    def columns(self) -> tuple[str, ...]:
        """What the tensors are called in a file."""
        return tuple(f"rows.{name}" if name else "rows" for name in self.names)

    def leaves(self, rows: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
        """The bytes of each tensor of these rows."""
        ends = np.cumsum(self.layout.leaf_bytes).tolist()
        return [rows[:, begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


# --- safetensors ----------------------------------------------------------------------------------------

_SAFETENSORS: Final[Mapping[str, str]] = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32",
    "float64": "F64", "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


def write_safetensors(path: Path, namespace: str, parts: Sequence[Part]) -> tuple[str, ...]:
    """Tensors ``keys`` and ``rows``, or ``rows.<name>`` for each tensor of a row; per layout, if there are several.

    The format is a few lines, and written here so that rows need not fit into memory; see the documentation of
    safetensors.
    """
    tensors: list[tuple[str, str, tuple[int, ...], int, tuple[int, int]]] = []
    for number, part in enumerate(parts):
        before = f"layout{number}/" if len(parts) > 1 else ""
        tensors.append((f"{before}keys", "U8", (part.count, KEY_BYTES), 1, (number, -1)))
        for place, (name, (dtype, shape)) in enumerate(zip(part.columns, part.layout.leaves, strict=True)):
            known = _known(dtype, _SAFETENSORS, ".npy")
            tensors.append((before + name, known, (part.count, *shape), dtype.itemsize, (number, place)))
    header: dict[str, Any] = {
        "__metadata__": {"namespace": namespace, **{f"tree{n}": part.layout.tree for n, part in enumerate(parts)}}
    }
    ends, end = {}, 0
    for name, known, shape, _, at in sorted(tensors, key=lambda tensor: -tensor[3]):  # so that each is aligned
        number, place = at
        size = parts[number].count * (KEY_BYTES if place < 0 else parts[number].layout.leaf_bytes[place])
        header[name] = {"dtype": known, "shape": shape, "data_offsets": [end, end + size]}
        ends[at], end = end, end + size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        begin = 8 + len(text)
        for number, part in enumerate(parts):
            for keys, rows in part.rows:
                for place, matrix in enumerate([keys, *part.leaves(rows)], start=-1):
                    file.seek(begin + ends[number, place])
                    file.write(np.ascontiguousarray(matrix).data)
                    ends[number, place] += matrix.size
        file.truncate(begin + end)
    return tuple(name for name, *_ in tensors)


# --- npy ------------------------------------------------------------------------------------------------

_NUMPY: Final[Mapping[str, str]] = {
    "bool": "?", "uint8": "u1", "int8": "i1", "int16": "<i2", "int32": "<i4", "int64": "<i8", "uint16": "<u2",
    "uint32": "<u4", "uint64": "<u8", "float16": "<f2", "float32": "<f4", "float64": "<f8", "complex64": "<c8",
    "complex128": "<c16",
    # What numpy does not have is written as what holds each of its values.
    "bfloat16": "<f4", "float8_e4m3fn": "<f4", "float8_e5m2": "<f4", "float8_e4m3fnuz": "<f4",
    "float8_e5m2fnuz": "<f4", "float8_e8m0fnu": "<f4",
}  # fmt: skip


def write_npy(path: Path, namespace: str, parts: Sequence[Part]) -> tuple[str, ...]:
    """One structured array: ``keys`` and ``rows``, or ``rows.<name>``; it can be mapped by ``np.load``."""
    if len(parts) > 1:
        raise UsageError(f"A .npy file holds rows of one shape, and these have {len(parts)}. Take .safetensors.")
    (part,) = parts
    known = [_known(dtype, _NUMPY, ".safetensors") for dtype, _ in part.layout.leaves]
    fields = [
        (name, code, shape) for name, code, (_, shape) in zip(part.columns, known, part.layout.leaves, strict=True)
    ]
    record = np.dtype([("keys", "u1", (KEY_BYTES,)), *fields])
    with open(path, "xb") as file:
        np.lib.format.write_array_header_2_0(
            file, {"descr": np.lib.format.dtype_to_descr(record), "fortran_order": False, "shape": (part.count,)}
        )
        for keys, rows in part.rows:
            records = np.empty(len(keys), record)
            records["keys"] = keys
            for name, values in zip(part.columns, _arrays(part, rows), strict=True):
                records[name] = values
            file.write(records.tobytes())
    return ("keys", *part.columns)


def _arrays(part: Part, rows: npt.NDArray[np.uint8]) -> list[npt.NDArray[Any]]:
    """The tensors of these rows as arrays of numpy."""
    found = []
    for matrix, (dtype, shape) in zip(part.leaves(rows), part.layout.leaves, strict=True):
        tensor = tensor_of(np.ascontiguousarray(matrix), dtype, shape)
        code = np.dtype(_NUMPY[_name_of(dtype)])
        widened = tensor if dtype.itemsize == code.itemsize else tensor.to(torch.float32)
        found.append(widened.numpy())
    return found


# --- parquet --------------------------------------------------------------------------------------------

_ARROW: Final = {name: code for name, code in _NUMPY.items() if not name.startswith("complex")}


def write_parquet(path: Path, namespace: str, parts: Sequence[Part]) -> tuple[str, ...]:
    """A table with ``keys``, and for each tensor of a row its values as a list and its shape as another one."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UsageError(
            "A .parquet file is written by pyarrow, which is not installed: pip install 'modcache[export]'"
        ) from None
    outlines = [tuple(zip(part.columns, [dtype for dtype, _ in part.layout.leaves], strict=True)) for part in parts]
    if len(set(outlines)) > 1:
        raise UsageError("A .parquet file holds tensors of the same names and dtypes in each row. Take .safetensors.")
    fields = [pa.field("keys", pa.binary(KEY_BYTES))]
    for name, dtype in outlines[0]:
        values = pa.from_numpy_dtype(np.dtype(_known(dtype, _ARROW, ".safetensors")))
        fields += [pa.field(name, pa.list_(values)), pa.field(f"{name}.shape", pa.list_(pa.int64()))]
    schema = pa.schema(fields, metadata={"namespace": namespace})
    with pq.ParquetWriter(path, schema) as file:
        for part in parts:
            for keys, rows in part.rows:
                columns = [pa.array(list(map(bytes, keys)), pa.binary(KEY_BYTES))]
                for values, (_, shape) in zip(_arrays(part, rows), part.layout.leaves, strict=True):
                    columns += [_lists(pa, values.reshape(len(keys), -1)), _lists(pa, _repeated(shape, len(keys)))]
                file.write_table(pa.Table.from_arrays(columns, schema=schema))
    return tuple(field.name for field in fields)


def _lists(pa: Any, matrix: npt.NDArray[Any]) -> Any:
    count, width = matrix.shape
    return pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * width, pa.array(matrix.reshape(-1)))


def _repeated(shape: tuple[int, ...], count: int) -> npt.NDArray[np.int64]:
    return np.tile(np.array(shape, np.int64), (count, 1))


# --- all of them ----------------------------------------------------------------------------------------


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _known(dtype: torch.dtype, codes: Mapping[str, str], other: str) -> str:
    code = codes.get(_name_of(dtype))
    if code is None:
        raise UsageError(f"The format has no {_name_of(dtype)}. Take {other}, if that has it.")
    return code


FORMATS: Final[Mapping[str, Callable[[Path, str, list[Part]], tuple[str, ...]]]] = {
    ".npy": write_npy,
    ".parquet": write_parquet,
    ".safetensors": write_safetensors,
}
"""What is known, by the suffix of the file."""
