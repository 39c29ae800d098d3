"""The student's logits at some positions, and the log-probabilities that losses need from them.

Everything is computed in float32 and in log space, whatever the student's dtype. A loss over stored ids needs k
gathered logits and one logsumexp per position. Their combined gradient is computed by custom functions here, so that a
pass has almost no [N, V] arrays besides the logits and their gradient.

Shape legend: N positions, V width of the student's head, m watched ids per position.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["StudentLogits"]


class StudentLogits:
    """A student's log-probabilities, computed once and shared by all losses.

    Args:
        logits: (N, V), any float dtype; converted to float32.
        watched: (N, m) int64, the ids whose individual log-probabilities the losses need.
    """

    def __init__(self, logits: torch.Tensor, watched: torch.Tensor) -> None:
        self.logits = logits.float()
        self.watched = watched
        self._normalisers: dict[float, torch.Tensor] = {}
        self._logprobs: dict[float, torch.Tensor] = {}
        self._all_logprobs: dict[float, torch.Tensor] = {}

    @property
    def size(self) -> int:
        """V, the number of logits per position."""
        return int(self.logits.shape[-1])

    def normaliser(self, temperature: float = 1.0) -> torch.Tensor:
        """(N,) log Σ_v exp(z_v / T); not differentiable."""
        if temperature not in self._normalisers:
            with torch.no_grad():
                self._normalisers[temperature] = _scaled(self.logits, temperature).logsumexp(-1)
        return self._normalisers[temperature]

    def logprobs(self, temperature: float = 1.0) -> torch.Tensor:
        """(N, m) log-probabilities of the watched ids under softmax(z / T) over the entire vocabulary."""
        if temperature not in self._logprobs:
            value = _LogProbs.apply(self.logits, self.watched, self.normaliser(temperature), temperature)
            self._logprobs[temperature] = value
        return self._logprobs[temperature]

    def all_logprobs(self, temperature: float = 1.0) -> torch.Tensor:
        """(N, V) log-probabilities of all ids under softmax(z / T), for teachers that provide all ids."""
        if temperature not in self._all_logprobs:
            self._all_logprobs[temperature] = _scaled(self.logits, temperature).log_softmax(-1)
        return self._all_logprobs[temperature]

    def logprob_outside(self, inside: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Compute the log of the total probability under softmax(z / T) of all ids except selected watched ones.

        It is summed directly rather than computed as 1 − Σ q, which for a confident student would be mostly rounding
        noise, just where the logarithm and its gradient are largest.

        Args:
            inside: (N, m) bool, the watched ids to exclude, which must be distinct.

        Returns:
            (N,), −inf where every id is excluded.
        """
        # Watched ids that are not excluded are replaced by one that is. Rows without exclusions are handled separately.
        first = self.watched.gather(-1, inside.int().argmax(-1, keepdim=True))
        ids = torch.where(inside, self.watched, first)
        outside = _Outside.apply(self.logits, ids, inside.any(-1), self.normaliser(temperature), temperature)
        return outside  # type: ignore[no-any-return]


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits if temperature == 1.0 else logits / temperature


class _LogProbs(torch.autograd.Function):
    """log softmax(z / T) at some ids. The [N, V] gradient is built in a single array: (Σ_ids − softmax·Σ) / T."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, ids: torch.Tensor, normaliser: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        ctx.save_for_backward(logits, ids, normaliser)
        ctx.temperature = temperature
        return logits.gather(-1, ids) / temperature - normaliser.unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, ids, normaliser = ctx.saved_tensors
        (at_ids,) = gradients
        gradient = _softmax(logits, normaliser, ctx.temperature)
        gradient *= -at_ids.sum(-1, keepdim=True)
        gradient.scatter_add_(-1, ids, at_ids)
        return _scaled_gradient(gradient, ctx.temperature), None, None, None


class _Outside(torch.autograd.Function):
    """log Σ_{v outside} softmax(z / T)_v."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        ids: torch.Tensor,
        any_inside: torch.Tensor,
        normaliser: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        outside = _scaled(logits, temperature).scatter(-1, ids, -torch.inf).logsumexp(-1)
        outside = torch.where(any_inside, outside, normaliser)
        ctx.save_for_backward(logits, ids, any_inside, normaliser, outside)
        ctx.temperature = temperature
        return outside - normaliser

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, ids, any_inside, normaliser, outside = ctx.saved_tensors
        # There is no gradient where no id is outside, nor where all of them are.
        scale = gradients[0] * torch.isfinite(outside) * any_inside
        # d log(Σ_out e^z) − d log(Σ e^z): softmax over the outside minus softmax over all ids.
        gradient = _softmax(logits, outside.nan_to_num(neginf=0.0), ctx.temperature)
        gradient.scatter_(-1, ids, 0.0)
        gradient -= _softmax(logits, normaliser, ctx.temperature)
        # Avoids 0 · inf where no id is outside.
        gradient = torch.where(scale.unsqueeze(-1) == 0, torch.zeros_like(gradient), gradient * scale.unsqueeze(-1))
        return _scaled_gradient(gradient, ctx.temperature), None, None, None, None


def _softmax(logits: torch.Tensor, normaliser: torch.Tensor, temperature: float) -> torch.Tensor:
    """(N, V) exp(z / T − normaliser), allocating a single array."""
    probability = logits / temperature if temperature != 1.0 else logits.clone()
    return probability.sub_(normaliser.unsqueeze(-1)).exp_()


def _scaled_gradient(gradient: torch.Tensor, temperature: float) -> torch.Tensor:
    return gradient if temperature == 1.0 else gradient.div_(temperature)
