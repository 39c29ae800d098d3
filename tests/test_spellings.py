"""Modules keep their public names, wherever their code is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from distillkit import bits, config
from distillkit.codec import bits as codec_bits
from distillkit.training.config.file import load_config


@pytest.mark.parametrize("module", ["sample_logits_vllm", "pack_logits"])
@pytest.mark.slow
def test_published_commands_run_as_modules(module: str) -> None:
    command = [sys.executable, "-m", f"distillkit.{module}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: python -m distillkit.{module} [OPTIONS]")


def test_public_modules_have_what_they_promise() -> None:
    assert (bits.pack, bits.unpack, bits.packed_len) == (codec_bits.pack, codec_bits.unpack, codec_bits.packed_len)
    assert config.load_config is load_config
