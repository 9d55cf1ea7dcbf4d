"""Let a trained model write."""

from __future__ import annotations

import torch
from torch import Tensor

from distmuon.training.config import SampleConfig
from distmuon.training.model import Transformer


@torch.no_grad()
def generate(model: Transformer, config: SampleConfig, *, seed: int) -> str:
    """Continue the prompt byte by byte.

    Args:
        model: in any mode; it has no dropout.
        config: prompt, length in bytes and temperature.
        seed: of the draws; the result depends on nothing else.

    Returns:
        The continuation without the prompt, printable: what is not UTF-8 or a control character
        becomes a replacement character.
    """
    device = model.embed_tokens.weight.device
    # The draws are made on the CPU so that a seed means the same on every device.
    generator = torch.Generator().manual_seed(seed)
    prompt = list(config.prompt.encode())
    tokens = torch.tensor([prompt], dtype=torch.int64, device=device)
    for _ in range(config.length):
        logits = model(tokens[:, -model.context :])[0, -1].float().cpu()
        chosen = _choose(logits, temperature=config.temperature, generator=generator)
        tokens = torch.cat((tokens, chosen.to(device).view(1, 1)), dim=1)
    return printable(bytes(tokens[0, len(prompt) :].tolist()))


def _choose(logits: Tensor, *, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0.0:
        return logits.argmax()
    chances = (logits / temperature).softmax(-1)
    return torch.multinomial(chances, 1, generator=generator)


def printable(data: bytes) -> str:
    """Decode bytes as UTF-8 and replace what a terminal cannot show or would obey."""
    text = data.decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
