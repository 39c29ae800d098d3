"""How capture and training read rows: every difference between them is an option here, with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distillkit.errors import ConfigError
from distillkit.text.layouts import CHATS, COMPLETION, PROMPTS

__all__ = ["ReadingPolicy", "SettingNames", "TextOptions", "capture_policy", "training_policy"]


@dataclass(frozen=True)
class SettingNames:
    """The names of the user's settings in messages about rows.

    Attributes:
        assistant, completion: the setting that restricts the loss to that part.
        template: the setting that names a tokenizer or a chat template.
        everything: how to compute the loss on all tokens instead.
        columns: the setting that chooses the columns to read.
        end: the setting that ends plain text with the end-of-sequence token, or names that token.
    """

    assistant: str
    completion: str
    template: str
    everything: str
    columns: str
    end: str


@dataclass(frozen=True)
class ReadingPolicy:
    """How rows become token documents.

    Attributes:
        names: names of the settings in messages.
        layouts: sets of columns to read a row by, in order of preference. By default token ids come first, and then
            prompts, chats and text, as with TRL; captures put layouts with the part that their loss is on before
            others. Training, like TRL, accepts prompt + completion but not prompt + response.
        text_column: the column with plain text.
        assistant: only the assistant's turns count.
        completion: only the response to a prompt counts. True: every row must have one; None: in rows that have one.
        mask_columns: columns of tokenised rows that say which tokens count; a token counts if all of them say so. None:
            every token counts, whatever the row says.
        needed_masks: (setting, columns) pairs: with that setting, a tokenised row must have labels or one of the
            columns. Capture accepts a plain loss_mask for the chosen part; TRL does not.
        template: chat template to use instead of the tokenizer's. TRL has variants that mark the assistant's turns.
        render_chats: whether chat rows may be rendered with a template; otherwise they are an error.
        tokenised_only: only rows of token ids are accepted (TRL's skip_prepare_dataset).
        end_text: plain text ends with the end-of-sequence token, from which the student learns to stop, and a tokenizer
            without one is an error.
        keep_packed: documents packed in one row of token ids stay together, with their lengths. A trainer separates
            them by position ids; a teacher must score each without the others as context.
        prefix_is_prompt: the response begins at the first token that differs from those of the prompt tokenised alone;
            this is TRL's rule, and does not need a fast tokenizer. Otherwise a token belongs to the response if it
            covers one of its characters, which is exact even where the end of the prompt tokenises differently alone.
    """

    names: SettingNames
    layouts: tuple[tuple[str, ...], ...]
    text_column: str = "text"
    assistant: bool = False
    completion: bool | None = None
    mask_columns: tuple[str, ...] | None = None
    needed_masks: tuple[tuple[str, tuple[str, ...]], ...] = ()
    template: str | None = None
    render_chats: bool = True
    tokenised_only: bool = False
    end_text: bool = False
    keep_packed: bool = False
    prefix_is_prompt: bool = False


# -- capture -----------------------------------------------------------------------------------------------------------

_CAPTURE_NAMES = SettingNames(
    assistant="loss_on: assistant",
    completion="loss_on: completion",
    template="--tokenizer",
    everything="capture with --loss-on all",
    columns="--read-columns",
    end="--append-eos",
)
_LAYOUTS = (("input_ids",), *PROMPTS, *CHATS, ("text",))
_CAPTURE_LAYOUTS = {
    "auto": _LAYOUTS,
    "all": _LAYOUTS,
    "assistant": (("input_ids",), *CHATS, *PROMPTS, ("text",)),
    "completion": _LAYOUTS,
}
_CAPTURE_MASKS = {
    "auto": ("loss_mask", "completion_mask", "assistant_masks"),
    "all": None,
    "assistant": ("assistant_masks", "loss_mask"),
    "completion": ("completion_mask", "loss_mask"),
}


def capture_policy(
    loss_on: str, *, render_chats: bool = True, columns: Sequence[str] = (), append_eos: bool = False
) -> ReadingPolicy:
    """Return how a capture reads rows.

    Args:
        loss_on: which tokens count. "auto": those that the row's own loss_mask, labels, message weights, … mark; the
            response if the row has prompt and response; otherwise all. "all": every token, whatever the row says.
            "assistant": the assistant's turns. "completion": the response.
        render_chats: whether the chat template may be used.
        columns: the columns to read rows by; none: those that they have. A single column of another name has text.
        append_eos: whether plain text ends with the end-of-sequence token.

    Raises:
        ConfigError: rows cannot be read by these columns.
    """
    masks = _CAPTURE_MASKS[loss_on]
    part = loss_on in ("assistant", "completion")
    layouts, text_column = _chosen_layouts(_CAPTURE_LAYOUTS[loss_on], columns)
    return ReadingPolicy(
        _CAPTURE_NAMES,
        layouts,
        text_column=text_column,
        assistant=loss_on == "assistant",
        completion={"auto": None, "completion": True}.get(loss_on, False),
        mask_columns=masks,
        needed_masks=((f"loss_on: {loss_on}", masks),) if part and masks else (),
        render_chats=render_chats,
        end_text=append_eos,
    )


def _chosen_layouts(
    layouts: tuple[tuple[str, ...], ...], columns: Sequence[str]
) -> tuple[tuple[tuple[str, ...], ...], str]:
    """Return the layouts that rows may have, and the name of the column with text."""
    if not columns:
        return layouts, "text"
    for layout in layouts:
        if sorted(layout) == sorted(columns):
            return (layout,), "text"
    if len(columns) > 1:
        raise ConfigError(
            f"read_columns: rows cannot be read by {' + '.join(columns)}; choose one column of text, or "
            f"{'; '.join(' + '.join(layout) for layout in layouts)}"
        )
    return ((columns[0],),), columns[0]


# -- training ----------------------------------------------------------------------------------------------------------

_TRAINING_NAMES = SettingNames(
    assistant="training_args.assistant_only_loss: true",
    completion="training_args.completion_only_loss: true",
    template="training_args.chat_template_path",
    everything="leave training_args.assistant_only_loss out",
    columns="training_args.dataset_text_field",
    end="training_args.eos_token",
)


@dataclass(frozen=True)
class TextOptions:
    """The `training_args` that decide how rows are read.

    Attributes:
        text_column: name of the column with plain text (dataset_text_field).
        text_first: that column takes precedence over all layouts except token ids.
        completion_only: compute the loss on completions only (completion_only_loss); None: in rows that have prompt
            and completion.
        assistant_only: compute the loss on the assistant's turns only (assistant_only_loss).
        tokenised: rows must already be token ids (dataset_kwargs: skip_prepare_dataset).
    """

    text_column: str = "text"
    text_first: bool = False
    completion_only: bool | None = None
    assistant_only: bool = False
    tokenised: bool = False


def training_policy(tokenizer: Any, options: TextOptions) -> ReadingPolicy:
    """Return how training reads rows: the resulting token ids and labels are those of TRL's SFTTrainer.

    Raises:
        ConfigError: the chat template cannot mark the assistant's turns.
    """
    text = (options.text_column,)
    first = [text] if options.text_first or options.text_column != "text" else []
    masks = ("loss_mask", "assistant_masks", *(("completion_mask",) if options.completion_only is not False else ()))
    needed = (
        (options.assistant_only, _TRAINING_NAMES.assistant, ("assistant_masks",)),
        (options.completion_only, _TRAINING_NAMES.completion, ("completion_mask",)),
    )
    return ReadingPolicy(
        _TRAINING_NAMES,
        tuple(dict.fromkeys([("input_ids",), *first, COMPLETION, *CHATS, text])),
        text_column=options.text_column,
        assistant=options.assistant_only,
        completion=options.completion_only,
        mask_columns=masks,
        needed_masks=tuple((setting, columns) for asked, setting, columns in needed if asked),
        template=_marked_template(tokenizer) if options.assistant_only else None,
        tokenised_only=options.tokenised,
        end_text=True,
        keep_packed=True,
        prefix_is_prompt=True,
    )


def _marked_template(tokenizer: Any) -> str | None:
    """Return a chat template that marks the assistant's tokens; None if the tokenizer's own does."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if not tokenizer.chat_template:
        raise ConfigError(
            "training_args.assistant_only_loss: the student's tokenizer has no chat template; set "
            "training_args.chat_template_path"
        )
    if isinstance(tokenizer.chat_template, dict):
        raise ConfigError(
            f"training_args.assistant_only_loss: the student's tokenizer has several chat templates "
            f"({', '.join(tokenizer.chat_template)}); set one with training_args.chat_template_path"
        )
    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ConfigError(
            "training_args.assistant_only_loss: the tokenizer's chat template does not mark the assistant's tokens "
            f"({{% generation %}}), and TRL has no variant of it that does; set training_args.chat_template_path "
            f"({error})"
        ) from error
    return template
