"""One vector of a text or an image from what is said of each of its parts."""

from __future__ import annotations

import torch


def pool_tokens(states: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """Reduce what is said of each token, of shape `(num_texts, num_tokens, size)`, to one vector per text."""
    if attention_mask is None:
        attention_mask = torch.ones(states.shape[:2], device=states.device, dtype=torch.long)
    if pooling == "mean":
        mask = attention_mask.to(states.dtype)
        return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    # By the mask, not by the place: texts may be padded on either side.
    places = torch.arange(states.shape[1], device=states.device) * attention_mask
    last = places.argmax(dim=1)
    index = last if pooling == "last" else attention_mask.argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), index]
