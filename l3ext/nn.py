"""The layer: ``W_mix [RMSNorm(W_up a) ; x]`` around segmented attention ``a``."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from l3ext._arrays import Array, from_numpy
from l3ext._checks import check_flags, integer, number
from l3ext._operators import as_device
from l3ext.allocation import Allocation, rows_checksum
from l3ext.ops import segmented_attention, table_attention
from l3ext.plans import Plan, as_ids, make_plan
from l3ext.quantization import QuantizedTable, check_quantized_dtype, quantize_rows, row_bytes

_TABLE_GONE = (
    "this layer's table has been moved out of the model by l3ext.offload: pass rows=, "
    "or run the model, which fetches them"
)


# In the metadata of a state dict: whose rows the table has.
_ALLOCATION = "l3_allocation"
_AUTOCAST_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def _buffer_name(dtype: torch.dtype) -> str:
    return f"table_{str(dtype).removeprefix('torch.')}"


class LayerRows(Protocol):
    """One layer's rows of a step, as ``Step.wait`` of the prefetch runtime yields them."""

    def attend(self, x: Tensor) -> Tensor:
        """What every position of ``x`` [N, d_model] gets from its token's rows, [N, d_emb]."""
        ...


class L3Layer(nn.Module):
    """Large Lookup Layer (arXiv 2601.21461): every token id owns rows that its positions attend to.

    Computes ``W_mix [RMSNorm_out(W_up a) ; x]`` with ``a`` the segmented attention of
    ``RMSNorm_in(x)`` to the rows of each position's token. The caller adds the residual.

    Args:
        d_model: width of ``x`` and of the keys.
        d_emb: width of the values.
        d_up: width after the up-projection.
        allocation: who owns how many rows; the vocabulary is its ``vocab_size``.
        tied: values are the keys, half the bytes; needs ``d_emb == d_model``.
        eps: of both norms.
        sparse: the table's gradient is a sparse tensor of the rows that the step touched, as
            :class:`torch.nn.Embedding` has it; for ``torch.optim.SparseAdam`` or ``SGD``. The
            layer cannot be compiled then, and on CUDA its backward pass waits for the device.
        device, dtype: of the parameters.

    The allocation is not in the state dict: save it beside (:meth:`Allocation.save`). As long as
    the state dict keeps its metadata, as ``torch.save`` and ``torch.load`` do, ``load_state_dict``
    refuses rows that belong to another allocation's tokens (RuntimeError, as for wrong shapes; the
    table stays as it was).

    Attributes:
        table: Parameter [v, d_model + d_emb], row-interleaved keys and values ([v, d_model] if
            tied), initialised like every linear of a Llama: normal, std 0.02. None once offloaded
            or quantised.
        quantized: the table in 8 bits, after :meth:`quantize_`; else None.

    Raises:
        ValueError: a width below 1, ``tied`` with ``d_emb != d_model``, or an ``eps`` below 0.
    """

    table: nn.Parameter | None
    _quantized_dtype: torch.dtype | None
    _quantized: QuantizedTable | None
    offsets: Tensor

    def __init__(
        self,
        d_model: int,
        d_emb: int,
        d_up: int,
        allocation: Allocation,
        tied: bool = False,
        eps: float = 1e-6,
        *,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_model = integer(d_model, "d_model", 1)
        d_emb = integer(d_emb, "d_emb", 1)
        d_up = integer(d_up, "d_up", 1)
        check_flags(tied=tied, sparse=sparse)
        if tied and d_emb != d_model:
            raise ValueError(f"d_emb: a tied table needs d_emb == d_model = {d_model}, got {d_emb}")
        if not isinstance(allocation, Allocation):
            raise TypeError(
                f"allocation: expected l3ext.Allocation, got {type(allocation).__name__}"
            )
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
        if device is not None:
            device = as_device(device, "device")
        eps = number(eps, "eps")
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps: expected 0 or more, and finite, got {eps}")
        self.d_model, self.d_emb, self.d_up = d_model, d_emb, d_up
        self.tied, self.sparse = bool(tied), bool(sparse)
        self.allocation = allocation
        self.max_rows = allocation.max_rows
        factory: Any = {"device": device, "dtype": dtype}
        width = d_model if tied else d_model + d_emb
        self.norm_in = nn.RMSNorm(d_model, eps=eps, **factory)
        self.table = nn.Parameter(torch.empty(allocation.total_rows, width, **factory))
        self._quantized_dtype = None
        self._quantized = None  # made of the buffer when it is asked for, and kept
        self.up = nn.Linear(d_emb, d_up, bias=False, **factory)
        self.norm_out = nn.RMSNorm(d_up, eps=eps, **factory)
        self.mix = nn.Linear(d_up + d_model, d_model, bias=False, **factory)
        # Not in the state dict: they follow from the allocation, which the layer's owner saves.
        offsets = torch.empty(allocation.vocab_size + 1, dtype=torch.int64, device=device)
        self.register_buffer("offsets", offsets, persistent=False)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw table and projections from a normal distribution; set both norms to 1.

        Also fills ``offsets``: call it after ``to_empty`` of a layer made on the meta device.
        """
        self._fill_offsets()
        if self.table is not None:
            nn.init.normal_(self.table, std=std)
        nn.init.normal_(self.up.weight, std=std)
        nn.init.normal_(self.mix.weight, std=std)
        nn.init.ones_(self.norm_in.weight)
        nn.init.ones_(self.norm_out.weight)

    def _fill_offsets(self) -> None:
        offsets = torch.tensor(self.allocation.offsets)
        if self.offsets.is_meta:
            # While a state dict is loaded the submodules follow: the table's device is known.
            table: Tensor | None = self.table
            if self._quantized_dtype is not None:
                table = self.get_buffer(_buffer_name(self._quantized_dtype))
            self.offsets = offsets.to((self.mix.weight if table is None else table).device)
        else:
            with torch.no_grad():
                self.offsets.copy_(offsets)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Where torch keeps its modules' versions: no tensor more, and torch.save writes it.
        if (metadata := getattr(destination, "_metadata", None)) is not None:
            metadata[prefix[:-1]][_ALLOCATION] = rows_checksum(self.allocation)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stored, own = local_metadata.get(_ALLOCATION), rows_checksum(self.allocation)
        has_rows = any(name.startswith(f"{prefix}table") for name in state_dict)
        if has_rows and stored not in (None, own):
            error_msgs.append(
                f"{prefix}table: expected rows of this layer's allocation ({own}), got those of "
                f"another ({stored}), in which other tokens own them"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # They are not in it, and a layer that was made on the meta device has none yet.
        self._fill_offsets()

    def plan(self, token_ids: Any) -> Plan:
        """The plan of these token ids, for all layers with this allocation."""
        ids = as_ids(token_ids)
        return make_plan(ids, self.offsets, max_rows=self.max_rows, check_offsets=False)

    @property
    def quantized(self) -> QuantizedTable | None:
        """The table in 8 bits, if the layer was quantised and not offloaded."""
        if self._quantized_dtype is None:
            return None
        storage = self.get_buffer(_buffer_name(self._quantized_dtype))
        # Compiled code makes its own: it would be compiled again when what is kept changes.
        kept = None if torch.compiler.is_compiling() else self._quantized
        if kept is not None and kept.storage is storage:
            return kept
        sizes = (self.d_model, self.d_emb, self.tied)
        table = QuantizedTable(storage, self._quantized_dtype, *sizes)
        if not torch.compiler.is_compiling():
            self._quantized = table
        return table

    def quantize_(self, dtype: torch.dtype = torch.int8) -> L3Layer:
        """Store the table in 8 bits, for inference: :func:`l3ext.quantize_rows`.

        ``table`` becomes None. The state dict then holds the rows and their scales as the uint8
        tensor ``table_int8`` or ``table_float8_e4m3fn``, which a layer that was quantised to the
        same dtype loads.

        Raises:
            TypeError: another dtype than torch.int8 and torch.float8_e4m3fn.
            ValueError: a row with NaN or infinity; the layer is left as it was.
            RuntimeError: the table has been quantised or offloaded already.
        """
        if self._quantized_dtype is not None:
            raise RuntimeError(f"this layer's table is quantised already: {self._quantized_dtype}")
        if self.table is None:
            raise RuntimeError(_TABLE_GONE)
        check_quantized_dtype(dtype)
        if self.table.is_meta:
            columns = row_bytes(self.d_model, self.d_emb, tied=self.tied)
            storage = self.table.new_empty(self.table.shape[0], columns, dtype=torch.uint8)
        else:
            storage = quantize_rows(self.table, self.d_model, dtype, tied=self.tied).storage
        self._set_quantized(storage, dtype)
        self.table = None
        return self

    def release_table(self) -> Tensor | QuantizedTable:
        """Take the table out of the module, which from then on needs ``rows=``."""
        table: Tensor | QuantizedTable | None = self.quantized
        if table is not None:
            assert self._quantized_dtype is not None
            delattr(self, _buffer_name(self._quantized_dtype))
            self._quantized_dtype = self._quantized = None
            return table
        if self.table is None:
            raise RuntimeError(_TABLE_GONE)
        table = self.table.detach()
        self.table = None
        return table

    def restore_table(self, table: Tensor | QuantizedTable) -> None:
        """Put back what :meth:`release_table` took."""
        if not isinstance(table, (Tensor, QuantizedTable)):
            raise TypeError(
                "table: expected what release_table returned, a torch.Tensor or "
                f"l3ext.QuantizedTable, got {type(table).__name__}"
            )
        if isinstance(table, QuantizedTable):
            self._set_quantized(table.storage, table.dtype)
        else:
            self.table = nn.Parameter(table)

    def _set_quantized(self, storage: Tensor, dtype: torch.dtype) -> None:
        # uint8: no cast of the module changes it. Named after the dtype, so that rows of one kind
        # are never loaded as those of the other.
        self.register_buffer(_buffer_name(dtype), storage)
        self._quantized_dtype = dtype

    def forward(
        self,
        x: Array,
        token_ids: Any = None,
        *,
        plan: Plan | None = None,
        rows: LayerRows | None = None,
    ) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., d_model], one position per token id; dtype of the parameters, but under
                autocast, or a NumPy array of it.
            token_ids: integers, shape of ``x`` without its last dimension: a tensor, a NumPy array
                or a list; or
            plan: their plan; or
            rows: fetched rows with their plan.

        Returns:
            [..., d_model], dtype of ``x``.
        """
        if sum(given is not None for given in (token_ids, plan, rows)) != 1:
            given = {"token_ids": token_ids, "plan": plan, "rows": rows}
            names = [name for name, value in given.items() if value is not None]
            raise ValueError(
                "token_ids, plan, rows: expected exactly one of them, got "
                f"{' and '.join(names) or 'none'}"
            )
        if not isinstance(x, Tensor):
            x = from_numpy(x, "x")
        self._check_dtype(x)
        if x.ndim == 0 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"x: expected {self.d_model} in the last dimension, got shape {list(x.shape)}"
            )
        if token_ids is not None:
            if not isinstance(token_ids, Tensor):
                token_ids = as_ids(token_ids).to(x.device)
            if token_ids.shape != x.shape[:-1]:
                raise ValueError(
                    f"token_ids: expected shape {list(x.shape[:-1])}, got {list(token_ids.shape)}"
                )
            plan = self.plan(token_ids)
        # Under autocast x is bfloat16 and the parameters are float32: the norms stay in float32.
        q = self.norm_in(x.to(self.norm_in.weight.dtype)).reshape(-1, self.d_model)
        up = self.up(self._attend(q, plan, rows).to(self.up.weight.dtype))
        up = self.norm_out(up.to(self.norm_out.weight.dtype))
        return self.mix(torch.cat([up.view(*x.shape[:-1], self.d_up).to(x.dtype), x], dim=-1))

    def _check_dtype(self, x: Tensor) -> None:
        if type(self.mix) is not nn.Linear:  # quantised, say, by a library that replaces modules
            return
        wanted = self.mix.weight.dtype
        if x.dtype == wanted:
            return
        # It converts between these alone.
        if torch.is_autocast_enabled(x.device.type) and {x.dtype, wanted} <= _AUTOCAST_DTYPES:
            return
        raise TypeError(f"x: expected {wanted}, the dtype of the layer's weights, got {x.dtype}")

    def _attend(self, q: Tensor, plan: Plan | None, rows: LayerRows | None) -> Tensor:
        if rows is not None:
            if not hasattr(rows, "attend"):
                raise TypeError(f"rows: expected those of a step, got {type(rows).__name__}")
            return rows.attend(q)
        assert plan is not None
        if (table := self.quantized) is not None:
            scales: Any = {"key_scales": table.key_scales, "value_scales": table.value_scales}
            return segmented_attention(q, table.keys, table.values, plan, **scales)
        if self.table is None:
            raise RuntimeError(_TABLE_GONE)
        # The queries take the table's dtype (under autocast they may differ), never the reverse:
        # that would copy the table.
        q = q.to(self.table.dtype)
        return table_attention(q, self.table, plan, tied=self.tied, sparse=self.sparse)

    def extra_repr(self) -> str:
        """Sizes, as ``repr`` of the module shows them."""
        return (
            f"d_model={self.d_model}, d_emb={self.d_emb}, d_up={self.d_up}, tied={self.tied}, "
            f"vocab={self.allocation.vocab_size}, rows={self.allocation.total_rows}, "
            f"max_rows={self.max_rows}"
            + (", sparse=True" if self.sparse else "")
            + (f", quantized={self._quantized_dtype}" if self._quantized_dtype else "")
        )
