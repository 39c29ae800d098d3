"""What the Hugging Face hub's errors mean, and what to do about them."""

from __future__ import annotations

from distillkit.configuration.secrets import redacted

__all__ = ["hub_problem", "is_hub_error"]

_CLIENTS = {"huggingface_hub", "httpx", "httpx2", "httpcore", "hf_xet"}
"""Packages whose errors are the hub's; releases of huggingface_hub use different HTTP clients."""

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

_BY_STATUS = {
    401: f"it does not accept the token, or there is none; {_LOG_IN}",
    403: f"the token may not do this; use one with write access (https://huggingface.co/settings/tokens): {_LOG_IN}",
    402: "the account has no storage left for this; free some, or ask for more",
    404: f"there is no such repository or file, or it is private and the token may not read it; {_LOG_IN}",
    409: "the repository was changed at the same time; run the same command again",
    413: "it does not take files this large; capture with fewer shard_tokens",
    429: "it has had too many requests; wait a few minutes, then run the same command again",
}


def is_hub_error(error: BaseException) -> bool:
    """Whether an error comes from the hub's client: a refusal, or a network that does not answer."""
    # Uploads in threads wrap the client's error in one of their own.
    kinds = [kind for cause in _causes(error) for kind in type(cause).__mro__]
    return bool({kind.__module__.partition(".")[0] for kind in kinds} & _CLIENTS)


def _causes(error: BaseException) -> list[BaseException]:
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    return causes


def hub_problem(error: BaseException) -> str:
    """Return what an error of the hub's client means and what to do, without secrets."""
    causes = _causes(error)
    names = {type(cause).__name__ for cause in causes}
    if "OfflineModeIsEnabled" in names:
        return "HF_HUB_OFFLINE is set, so the hub is not asked; unset it"
    if "LocalTokenNotFoundError" in names:
        return f"there is no token; {_LOG_IN}"
    if "HFValidationError" in names:
        return f"{_first_line(error)}; expected OWNER/NAME"
    if "GatedRepoError" in names:
        return "its owner gives access on request; ask for it on the repository's page"
    if "RevisionNotFoundError" in names:
        return "it has no such branch, tag or commit"
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            known = _BY_STATUS.get(status)
            if known is None and status >= 500:
                known = "it has a problem of its own; try again later"
            # The hub's own words often say more.
            return f"{known} (HTTP {status}: {_first_line(cause)})" if known else f"HTTP {status}: {_first_line(cause)}"
    return (
        f"it cannot be reached ({_first_line(causes[-1])}); check the network, a proxy (HTTPS_PROXY) and HF_ENDPOINT, "
        "then run the same command again"
    )


def _first_line(error: BaseException) -> str:
    message = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
    return redacted(str(message).strip().splitlines()[0]).rstrip(".")
