"""Llama with lookup layers: transformers' decoder layers, some followed by an L3 layer."""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaPreTrainedModel

from l3ext.models.configuration_l3_llama import L3LlamaConfig
from l3ext.models.prefill import chunk_length, run_in_chunks
from l3ext.models.stored_allocation import (
    FREQUENCY,
    ROWS,
    check_same_rows,
    hub_arguments,
    read_allocation,
)
from l3ext.nn import L3Layer
from l3ext.plans import Plan


class L3LlamaDecoderLayer(LlamaDecoderLayer):
    """A Llama decoder layer and the lookup layer that follows it: ``h + L3(h)``."""

    def __init__(self, config: L3LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        assert config.allocation is not None
        self.l3_index = config.l3_layers.index(layer_idx + 1)
        self.l3 = L3Layer(
            config.hidden_size,
            config.l3_d_emb,
            config.l3_d_up,
            config.allocation,
            tied=config.l3_tied,
            eps=config.rms_norm_eps,
        )

    def forward(self, hidden_states: Tensor, *args: Any, l3_step: Any, **kwargs: Any) -> Tensor:
        """As the Llama layer's; ``l3_step`` is the step's plan or its fetch in progress."""
        hidden_states = super().forward(hidden_states, *args, **kwargs)
        if isinstance(l3_step, Plan):
            return hidden_states + self.l3(hidden_states, plan=l3_step)
        return hidden_states + self.l3(hidden_states, rows=l3_step.wait(self.l3_index))


class L3LlamaPreTrainedModel(LlamaPreTrainedModel):
    """What both classes need of transformers: initialisation and the allocation in checkpoints."""

    config: L3LlamaConfig
    _no_split_modules = ["LlamaDecoderLayer", "L3LlamaDecoderLayer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, L3Layer):
            if module.table is not None:
                init.normal_(module.table, mean=0.0, std=self.config.initializer_range)
            init.copy_(module.offsets, torch.tensor(module.allocation.offsets))
        elif isinstance(module, L3LlamaModel) and hasattr(module, ROWS):
            # Some versions (5.3 is one) initialise in Llama's constructor, before we have buffers.
            module._fill_allocation()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As transformers'; the allocation comes out of the checkpoint's safetensors.

        Raises:
            ValueError: the configuration came with an allocation of other rows.
            OSError: there is none in either.
        """
        path = pretrained_model_name_or_path
        hub = hub_arguments(kwargs)
        if config is None:
            config = L3LlamaConfig.from_pretrained(path, **hub)
        if path is not None and isinstance(config, L3LlamaConfig) and config.l3_layers:
            stored = read_allocation(path, hub)
            if config.allocation is None:
                if stored is None:
                    raise OSError(
                        f"{path}: expected a safetensors checkpoint that holds {ROWS}, found none"
                    )
                config.allocation = stored
            elif stored is not None:  # before torch finds tables of other sizes
                check_same_rows(torch.tensor(stored.rows), config.allocation)
        loaded = super().from_pretrained(path, *args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():  # what came in other ways than as safetensors
            if isinstance(module, L3LlamaModel):
                module._check_allocation()
        return loaded

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """As of every model, but the vocabulary stays: the allocation says who owns which rows.

        Raises:
            ValueError: another size; the model is left as it was.
        """
        vocab_size = self.config.vocab_size
        size = vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size != vocab_size and self.config.l3_layers:
            raise ValueError(
                f"new_num_tokens: expected {vocab_size}, the tokens of the allocation, got {size}: "
                "new tokens own no rows; make the model with an allocation that has them"
            )
        resized: nn.Module = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        return resized

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As transformers'. A model without its whole, exact tables has nothing to save."""
        for name, module in self.named_modules():
            if isinstance(module, L3Layer) and module.quantized is not None:
                raise RuntimeError(
                    f"{name}: its table has been quantised, which a checkpoint does not hold; "
                    "save the model before, and quantise it after loading"
                )
            if isinstance(module, L3Layer) and module.table is None:
                raise RuntimeError(
                    f"{name}: its table has been moved out of the model by l3ext.offload; "
                    "save the model before offloading it"
                )
        super().save_pretrained(save_directory, **kwargs)


class L3LlamaModel(L3LlamaPreTrainedModel, LlamaModel):
    """Llama's decoder with lookup layers; one plan a forward, shared by all of them."""

    #: The prefetch runtime that serves the tables, once ``l3ext.offload`` has moved them out.
    l3_runtime: Any = None

    def __init__(self, config: L3LlamaConfig) -> None:
        allocation = config.allocation if config.l3_layers else None
        if config.l3_layers and allocation is None:
            raise ValueError(
                "config.allocation: expected an l3ext.Allocation, got None; a configuration read "
                "from JSON has none: use from_pretrained, or set it"
            )
        super().__init__(config)
        for layer in config.l3_layers:
            self.layers[layer - 1] = L3LlamaDecoderLayer(config, layer - 1)
        if allocation is not None:
            vocab = allocation.vocab_size
            self.register_buffer(ROWS, torch.empty(vocab, dtype=torch.int32))
            self.register_buffer(FREQUENCY, torch.empty(vocab, dtype=torch.int64))
            self._fill_allocation()
        self.post_init()

    def _fill_allocation(self) -> None:
        """Write the allocation into the buffers by which checkpoints carry it."""
        allocation = self.config.allocation
        assert allocation is not None
        frequency = allocation.frequency
        if frequency is None:
            frequency = np.full(allocation.vocab_size, -1)
        # By transformers' copy, which leaves what has been loaded, to be checked.
        init.copy_(self.get_buffer(ROWS), torch.tensor(allocation.rows))
        init.copy_(self.get_buffer(FREQUENCY), torch.tensor(frequency))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **options: Any
    ) -> None:
        # First: tables of other owners may have the same shape.
        if prefix + ROWS in state_dict:
            self._check_allocation(state_dict[prefix + ROWS])
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)

    def _check_allocation(self, rows: Tensor | None = None) -> None:
        """ValueError unless these rows, or those in the buffer, are the configuration's."""
        if self.config.l3_layers:
            assert self.config.allocation is not None
            check_same_rows(self.get_buffer(ROWS) if rows is None else rows, self.config.allocation)

    @property
    def l3_layers(self) -> list[L3Layer]:
        """The lookup layers, first to last."""
        return [self.layers[layer - 1].l3 for layer in self.config.l3_layers]

    def forward(
        self,
        input_ids: Tensor | None = None,
        *args: Any,
        l3_token_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Llama's.

        A long prompt of an offloaded model runs in chunks of the runtime's ``prefill_chunk``
        positions where it fills a cache of keys and values.

        Args:
            input_ids: integers [batch, sequence].
            *args: as Llama's.
            l3_token_ids: the ids that the lookup layers see, for callers that pass
                ``inputs_embeds`` instead of ``input_ids``.
            **kwargs: as Llama's.
        """
        if not self.config.l3_layers:
            return super().forward(input_ids, *args, **kwargs)
        token_ids = input_ids if l3_token_ids is None else l3_token_ids
        if token_ids is None:
            raise ValueError("inputs_embeds: lookup layers need token ids, pass l3_token_ids")
        if self.l3_runtime is None:
            step = self.l3_layers[0].plan(token_ids)
            return super().forward(input_ids, *args, l3_step=step, **kwargs)
        chunk = 0 if args else chunk_length(self.l3_runtime, self.config, token_ids, kwargs)
        if chunk:
            run = super().forward
            return run_in_chunks(self.l3_runtime, token_ids, chunk, run, input_ids, kwargs)
        # Returns at once: the fetch runs while the layers before the first lookup layer do.
        with self.l3_runtime.begin(token_ids) as step:
            return super().forward(input_ids, *args, l3_step=step, **kwargs)


class L3LlamaForCausalLM(L3LlamaPreTrainedModel, LlamaForCausalLM):
    """A causal language model with lookup layers; everything else is Llama's."""

    def __init__(self, config: L3LlamaConfig) -> None:
        # Llama's own constructor would build its decoder, only to be thrown away.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = L3LlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
