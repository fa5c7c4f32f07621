from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

has_cuda: bool
version: str

def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def cuda_devices() -> list[dict[str, Any]]: ...
def crc32c(data: Any) -> int: ...
def plan(
    token_ids: Any,
    offsets: Any,
    check_offsets: bool,
    permutation: Any,
    segment_tokens: Any,
    segment_queries: Any,
    segment_rows: Any,
    num_segments: Any,
    table_rows: Any,
    schedule: Any,
    queue: tuple[int, Callable[[int], Any]],
) -> None: ...
def schedule(
    segment_queries: Any,
    segment_rows: Any,
    num_segments: Any,
    schedule: Any,
    queue: tuple[int, Callable[[int], Any]],
) -> None: ...
def segmented_attention(
    x: Any,
    keys: Any,
    values: Any,
    plan: Sequence[Any],
    max_rows: int,
    scale: float,
    num_threads: int,
    y: Any,
    queue: tuple[int, Callable[[int], Any]],
    key_scales: Any | None = ...,
    value_scales: Any | None = ...,
) -> None: ...
def directory_attention(
    x: Any,
    directory: Any,
    plan: Sequence[Any],
    max_rows: int,
    row_stride: int,
    value_offset: int,
    scale: float,
    num_threads: int,
    y: Any,
    queue: tuple[int, Callable[[int], Any]],
    row_dtype: str | None = ...,
    scale_offset: int = ...,
) -> None: ...
def segmented_attention_backward(
    dy: Any,
    x: Any,
    keys: Any,
    values: Any,
    plan: Sequence[Any],
    max_rows: int,
    scale: float,
    num_threads: int,
    segment_gradients: Any | None,
    dx: Any | None,
    dkeys: Any | None,
    dvalues: Any | None,
    queue: tuple[int, Callable[[int], Any]],
) -> None: ...

class LZWCounter:
    def __init__(self, vocab_size: int, parse: str, max_codewords: int | None) -> None: ...
    @staticmethod
    def load(path: str) -> LZWCounter: ...
    def save(self, path: str) -> None: ...
    def update(self, tokens: Any, offsets: Any) -> None: ...
    def merge(self, other: LZWCounter) -> None: ...
    def codewords(self, begin: int, end: int) -> list[tuple[tuple[int, ...], int]]: ...
    def copy_frequency(self, out: Any) -> None: ...
    def grant(self, total_rows: int, max_rows: int, out: Any) -> None: ...
    @property
    def parse(self) -> str: ...
    @property
    def max_codewords(self) -> int | None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_codewords(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class Table:
    def __init__(
        self, data: Any, offsets: Any, frequency: Any | None, d_in: int, tied: bool
    ) -> None: ...
    @staticmethod
    def quantized(
        storage: Any, keys: Any, offsets: Any, frequency: Any | None, d_emb: int, tied: bool
    ) -> Table: ...
    @property
    def dtype(self) -> str: ...
    @property
    def d_in(self) -> int: ...
    @property
    def d_emb(self) -> int: ...
    @property
    def tied(self) -> bool: ...
    @property
    def offsets(self) -> np.ndarray: ...
    def checksums(self) -> np.ndarray: ...
    def drop_checksums(self) -> None: ...

class DirectIo:
    AUTO: DirectIo
    ON: DirectIo
    OFF: DirectIo

class IoEngine:
    AUTO: IoEngine
    URING: IoEngine
    PREAD: IoEngine

class TableFile:
    def __init__(self, path: str, direct_io: DirectIo, io_engine: IoEngine) -> None: ...
    @property
    def direct(self) -> bool: ...
    @property
    def io_engine(self) -> Literal["io_uring", "pread"]: ...
    def tables(self) -> list[Table]: ...

class MappedTables:
    def __init__(self, path: str) -> None: ...
    @property
    def guarded(self) -> bool: ...
    def tables(self) -> list[Table]: ...

def write_table_file(path: str, tables: list[Table]) -> None: ...

class Ledger:
    def steps(self) -> list[dict[str, Any]]: ...
    def totals(self) -> dict[str, Any]: ...
    def clear(self) -> None: ...
    def write_chrome_trace(self, path: str) -> None: ...

class PrefetchStep:
    def wait(self, layer: int, segment_rows: Any, stream: int = 0) -> None: ...
    def spill(self, layer: int) -> object | None: ...
    def end(self, stream: int = 0) -> None: ...

class Prefetcher:
    def __init__(
        self,
        tables: list[Table],
        device: str,
        *,
        cache_bytes: int,
        ring_bytes: int,
        num_workers: int,
        queue_depth: int,
        piece_bytes: int,
        record_steps: int,
        in_place: bool,
        poison: bool,
    ) -> None: ...
    def begin(self, token_ids: Any) -> PrefetchStep: ...
    def arena(self, layer: int) -> object: ...
    def close(self) -> None: ...
    @property
    def ledger(self) -> Ledger: ...
    def placement(self) -> list[dict[str, int]]: ...
