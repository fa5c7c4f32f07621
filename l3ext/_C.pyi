from typing import Any

has_cuda: bool
version: str

def cpu_isa() -> str: ...
def cpu_features() -> dict[str, bool]: ...
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
) -> None: ...
def segmented_attention(
    x: Any,
    keys: Any,
    values: Any,
    permutation: Any,
    segment_queries: Any,
    segment_rows: Any,
    num_segments: Any,
    table_rows: Any,
    scale: float,
    num_threads: int,
    y: Any,
) -> None: ...
def segmented_attention_backward(
    dy: Any,
    x: Any,
    keys: Any,
    values: Any,
    permutation: Any,
    segment_queries: Any,
    segment_rows: Any,
    num_segments: Any,
    table_rows: Any,
    scale: float,
    num_threads: int,
    dx: Any | None,
    dkeys: Any | None,
    dvalues: Any | None,
) -> None: ...

class LZWCounter:
    def __init__(self, vocab_size: int, parse: str) -> None: ...
    @staticmethod
    def load(path: str) -> LZWCounter: ...
    def save(self, path: str) -> None: ...
    def update(self, tokens: Any, offsets: Any) -> None: ...
    def codewords(self, begin: int, end: int) -> list[tuple[tuple[int, ...], int]]: ...
    def copy_frequency(self, out: Any) -> None: ...
    def grant(self, total_rows: int, max_rows: int, out: Any) -> None: ...
    @property
    def parse(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_codewords(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
