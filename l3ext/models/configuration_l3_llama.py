"""A Llama's configuration plus where its lookup layers stand and who owns their rows."""

from __future__ import annotations

import contextlib
import operator
import os
from collections.abc import Sequence
from typing import Any

from safetensors import SafetensorError
from transformers import LlamaConfig

from l3ext._checks import check_flags, integer
from l3ext.allocation import Allocation
from l3ext.models.stored_allocation import hub_arguments, read_allocation


class L3LlamaConfig(LlamaConfig):
    """Configuration of :class:`L3LlamaForCausalLM`.

    Args:
        l3_layers: after how many decoder layers each lookup layer follows, ascending; 1 to
            ``num_hidden_layers``.
        l3_d_emb: width of the values.
        l3_d_up: width after the up-projection.
        l3_tied: values are the keys; needs ``l3_d_emb == hidden_size``.
        allocation: who owns how many rows, the same in every lookup layer; its ``vocab_size`` must
            be the model's; only models without lookup layers do without. Kept beside the JSON
            fields: the checkpoint's safetensors hold it.
        **kwargs: of ``transformers.LlamaConfig``.

    Raises:
        ValueError: values that do not fit each other.
        TypeError: ``l3_layers`` that are no list of integers, widths that are none, or an unknown
            argument that begins with ``l3_``.
    """

    model_type = "l3_llama"

    def __init__(
        self,
        l3_layers: Sequence[int] | None = None,
        l3_d_emb: int | None = None,
        l3_d_up: int | None = None,
        l3_tied: bool = False,
        allocation: Allocation | None = None,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            if name.startswith("l3_"):  # transformers would keep it as one more field
                raise TypeError(
                    f"{name}: expected l3_layers, l3_d_emb, l3_d_up, l3_tied or allocation, got an "
                    "unknown argument"
                )
        super().__init__(**kwargs)
        check_flags(l3_tied=l3_tied)
        try:
            self.l3_layers = [operator.index(layer) for layer in l3_layers or ()]
        except TypeError as error:
            raise TypeError(f"l3_layers: expected a list of integers, got {l3_layers!r}") from error
        width = self.hidden_size
        self.l3_d_emb = integer(width if l3_d_emb is None else l3_d_emb, "l3_d_emb", 1)
        self.l3_d_up = integer(width if l3_d_up is None else l3_d_up, "l3_d_up", 1)
        self.l3_tied = bool(l3_tied)
        self._allocation: Allocation | None = None
        self._check_layers()
        if allocation is not None:
            self.allocation = allocation

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; of a local checkpoint with its allocation."""
        path, hub = pretrained_model_name_or_path, hub_arguments(kwargs)
        found = super().from_pretrained(path, *args, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        if config.l3_layers and config.allocation is None and os.path.isdir(path):
            # A hub would send the whole weights. What is damaged or does not fit is for the model.
            with contextlib.suppress(OSError, SafetensorError, ValueError):
                if (allocation := read_allocation(path, hub)) is not None:
                    config.allocation = allocation
        return found

    def _check_layers(self) -> None:
        layers = self.l3_layers
        if layers != sorted(set(layers)) or any(
            not 1 <= layer <= self.num_hidden_layers for layer in layers
        ):
            raise ValueError(
                "l3_layers: expected ascending positions from 1 to num_hidden_layers = "
                f"{self.num_hidden_layers}, got {layers}"
            )
        if self.l3_tied and self.l3_d_emb != self.hidden_size:
            raise ValueError(
                f"l3_d_emb: l3_tied needs hidden_size = {self.hidden_size}, got {self.l3_d_emb}"
            )

    @property
    def allocation(self) -> Allocation | None:
        """Who owns how many rows; None in a configuration read from JSON alone, as AutoConfig's."""
        return self.__dict__.get("_allocation")

    @allocation.setter
    def allocation(self, allocation: Allocation) -> None:
        if not isinstance(allocation, Allocation):
            raise TypeError(
                f"allocation: expected l3ext.Allocation, got {type(allocation).__name__}"
            )
        if allocation.vocab_size != self.vocab_size:
            raise ValueError(
                f"allocation: expected vocab_size = {self.vocab_size} tokens, "
                f"got {allocation.vocab_size}"
            )
        self._allocation = allocation

    def to_dict(self) -> dict[str, Any]:
        """The JSON fields; the allocation is not among them."""
        allocation = self.__dict__.pop("_allocation", None)
        try:
            return super().to_dict()
        finally:
            self._allocation = allocation
