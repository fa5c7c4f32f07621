"""A model on the device whose tables are not: the same bits as with them in the model."""

from __future__ import annotations

import pytest
import torch

import l3ext
from tests.gpu.test_models import make_model, random_ids


def generate(model, device):
    ids = random_ids(2, 5).to(device)
    return model.generate(ids, max_new_tokens=10, do_sample=False)


@pytest.mark.parametrize("tier", ["ram", "disk"])
@pytest.mark.parametrize(
    "options", [{}, {"cache_bytes": 8000}, {"ring_bytes": 0}, {"poison": True}], ids=str
)
def test_the_same_bits(device, tier, options, tmp_path):
    ids = random_ids(2, 20).to(device)
    resident, offloaded = make_model().to(device), make_model()
    path = tmp_path / "tables" if tier == "disk" else None
    runtime = l3ext.offload(offloaded, tier, path, device=device, **({"in_place": False} | options))
    offloaded.to(device)
    with torch.no_grad(), runtime:
        for _ in range(3):
            assert torch.equal(offloaded(ids).logits, resident(ids).logits)
        assert torch.equal(generate(offloaded, device), generate(resident, device))
        assert torch.device(runtime.placement.device).type == device.type
        assert runtime.ledger.totals.rows > 0


def test_a_model_that_is_on_the_device_already(device):
    resident, offloaded = make_model().to(device), make_model().to(device)
    with torch.no_grad(), l3ext.offload(offloaded, "ram", device=device):
        assert torch.equal(generate(offloaded, device), generate(resident, device))


def test_near_data_is_close(device):
    ids = random_ids(1, 12).to(device)
    resident, offloaded = make_model().to(device), make_model()
    runtime = l3ext.offload(offloaded, "ram", device=device, in_place=False, near_data=True)
    offloaded.to(device)
    with torch.no_grad(), runtime:
        torch.testing.assert_close(
            offloaded(ids).logits, resident(ids).logits, rtol=1e-4, atol=1e-5
        )
        assert runtime.ledger.totals.near > 0
