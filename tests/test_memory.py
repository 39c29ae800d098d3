"""Available memory of a device; of a GPU with figures in the place of a driver's."""

from __future__ import annotations

import pytest
import torch

from distillkit import memory


def test_a_gpus_cached_memory_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert memory.available_memory(torch.device("cuda")) == 1000 + 500 - 200


def test_the_cpus_available_memory_is_part_of_its_total() -> None:
    cpu = torch.device("cpu")
    assert 0 < memory.available_memory(cpu) < memory.total_memory(cpu)
