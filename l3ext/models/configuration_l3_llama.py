"""A Llama's configuration plus where its lookup layers stand and who owns their rows."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from transformers import LlamaConfig

from l3ext.allocation import Allocation


class L3LlamaConfig(LlamaConfig):
    """Configuration of :class:`L3LlamaForCausalLM`.

    Args:
        l3_layers: after how many decoder layers each lookup layer follows, ascending; 1 to
            ``num_hidden_layers``.
        l3_d_emb: width of the values.
        l3_d_up: width after the up-projection.
        l3_tied: values are the keys; needs ``l3_d_emb == hidden_size``.
        allocation: who owns how many rows, the same in every lookup layer; its ``vocab_size`` must
            be the model's. Kept beside the JSON fields: the checkpoint's safetensors hold it.
        **kwargs: of ``transformers.LlamaConfig``.

    Raises:
        ValueError: values that do not fit each other.
        TypeError: ``l3_layers`` that are no list of integers.
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
        super().__init__(**kwargs)
        try:
            self.l3_layers = [operator.index(layer) for layer in l3_layers or ()]
        except TypeError as error:
            raise TypeError(f"l3_layers: expected a list of integers, got {l3_layers!r}") from error
        self.l3_d_emb = self.hidden_size if l3_d_emb is None else l3_d_emb
        self.l3_d_up = self.hidden_size if l3_d_up is None else l3_d_up
        self.l3_tied = l3_tied
        self._allocation: Allocation | None = None
        self._check_layers()
        if allocation is not None:
            self.allocation = allocation

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
        """Who owns how many rows; None in a configuration read from JSON alone."""
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
