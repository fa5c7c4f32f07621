"""Text generated with the lookup tables in the model, then in a file: the same tokens.

python offloaded_generate.py [tables.safetensors]
"""

import sys

import torch

import l3ext
from l3ext.models import L3LlamaConfig, L3LlamaForCausalLM

# A model of random weights; a trained one comes from L3LlamaForCausalLM.from_pretrained(folder).
torch.manual_seed(1)
corpus = torch.randint(0, 1000, (20_000,)).square() // 1000  # some tokens more often than others
config = L3LlamaConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    bos_token_id=None,
    eos_token_id=None,
    l3_layers=[1, 3],
    l3_d_emb=32,
    l3_d_up=128,
    allocation=l3ext.allocate(corpus, vocab_size=1000, total_rows=4000, max_rows=32),
)
model = L3LlamaForCausalLM(config).eval()
prompt = corpus[None, :8]
resident = model.generate(prompt, max_new_tokens=32, do_sample=False)

path = sys.argv[1] if len(sys.argv) > 1 else "tables.safetensors"
with l3ext.offload(model, tier="disk", path=path, cache_bytes=256 << 10) as runtime:
    offloaded = model.generate(prompt, max_new_tokens=32, do_sample=False)
    print(runtime)
    totals = runtime.ledger.totals
    hits = totals.hits / totals.tokens
    print(f"{totals.steps} steps, {hits:.0%} of the tokens from the hot set")
    print(f"fetched for {totals.fetch_us:.0f} us, waited for {totals.exposed_us:.0f} us of it")
print("the same text:", torch.equal(resident, offloaded))
