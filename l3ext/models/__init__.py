"""Models with Large Lookup Layers, as transformers classes.

Importing this package registers them: ``AutoModelForCausalLM.from_pretrained`` then finds them.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from l3ext.models.configuration_l3_llama import L3LlamaConfig
from l3ext.models.modeling_l3_llama import L3LlamaForCausalLM, L3LlamaModel

AutoConfig.register(L3LlamaConfig.model_type, L3LlamaConfig, exist_ok=True)
AutoModel.register(L3LlamaConfig, L3LlamaModel, exist_ok=True)
AutoModelForCausalLM.register(L3LlamaConfig, L3LlamaForCausalLM, exist_ok=True)

__all__ = ["L3LlamaConfig", "L3LlamaForCausalLM", "L3LlamaModel"]
