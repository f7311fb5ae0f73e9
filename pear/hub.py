"""Whether the Hugging Face hub can be reached, asked once: its own client tries for half a minute, file after file."""

import functools
import logging
import os

from huggingface_hub import constants, get_session

logger = logging.getLogger("pear.hub")
TIMEOUT = 5.0  # seconds


def settle(name: str) -> None:
    """Turn the hub's client to its cache for the rest of the process where the hub cannot be reached."""
    if constants.HF_HUB_OFFLINE or not (reason := unreachable()):
        return
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # of processes started from here
    if os.path.isdir(os.path.join(constants.HF_HUB_CACHE, "models--" + name.replace("/", "--"))):
        logger.warning(f"model {name!r} comes from the hub's cache, as it was last loaded: {reason}")


def unreachable() -> str | None:
    """Why the hub gave no answer, if it was asked and gave none."""
    return None if _offline_by_choice else _reason()


_offline_by_choice = constants.HF_HUB_OFFLINE


@functools.cache
def _reason() -> str | None:
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # of requests or httpx, as the hub's client has it
        words = " ".join(str(error).split())[:200] or type(error).__name__
        return f"{constants.ENDPOINT} cannot be reached ({words})"
    return None
