"""The entries of `loss_functions` in a training configuration. Nothing here imports torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["LATER_LOSSES", "LATER_MISSING", "LOSS_NAMES", "LossConfig"]

# What `distillkit.losses.table` implements, and the published names that it does not implement yet.
LOSS_NAMES = ("cross_entropy", "kl")
LATER_LOSSES = ("jsd", "tvd", "hinge", "logistic_ranking", "hs_mse", "hs_cosine")
LATER_MISSING = ("label",)

# Published configurations spell the bucket for missing probability in two ways.
_SYNONYMS = {"symmetric_uniform": "uniform"}


class LossConfig(BaseModel):
    """One loss of the weighted sum Σ weight·loss / Σ weight.

    Attributes:
        function: its name in the table of losses.
        weight: finite and ≥ 0; with 0 the loss is computed and logged, and trains nothing.
        temperature: T > 0 of a divergence: both distributions are taken at p^(1/T), and the loss is multiplied by T².
        missing_probability_handling: what becomes of the teacher's probability outside the stored ids: `zero` drops it
            and renormalises the rest, `uniform` (also spelt `symmetric_uniform`) keeps it as one bucket, for the
            student too.
        sparse_chunk_length: most positions whose logits exist at one time; chosen from the vocabulary's size if not
            given.
        margin: of a ranking loss.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    function: Literal["cross_entropy", "kl", "jsd", "tvd", "hinge", "logistic_ranking", "hs_mse", "hs_cosine"]
    weight: float = Field(ge=0, allow_inf_nan=False)
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    missing_probability_handling: Literal["zero", "uniform", "label"] | None = None
    sparse_chunk_length: int | None = Field(default=None, ge=1)
    margin: float | None = Field(default=None, allow_inf_nan=False)

    @field_validator("missing_probability_handling", mode="before")
    @classmethod
    def _one_spelling(cls, value: object) -> object:
        return _SYNONYMS.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _only_what_it_takes(self) -> LossConfig:
        if self.margin is not None and self.function != "hinge":
            raise ValueError(f"margin: {self.margin} has no meaning for {self.function}; only hinge takes one")
        if self.function == "cross_entropy":
            if self.temperature not in (None, 1.0):
                raise ValueError(
                    f"temperature: {self.temperature} has no meaning for cross_entropy; only a divergence takes one"
                )
            if self.missing_probability_handling is not None:
                raise ValueError(
                    f"missing_probability_handling: {self.missing_probability_handling!r} has no meaning for "
                    "cross_entropy, which does not look at the teacher"
                )
        return self
