"""Ray's token authentication, as the environment has it: what a client needs to be let in. No ray."""

from __future__ import annotations

import os
from pathlib import Path

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def mode() -> str:
    """ "token", "disabled", or empty: then clients send no token, also where there is one."""
    return os.environ.get(MODE, "").lower()


def token_source() -> str | None:
    """Where Ray would take the token from; None if there is none. The token itself is not read."""
    if os.environ.get(TOKEN):
        return f"${TOKEN}"
    path = Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
    return str(path) if path.is_file() else None


def remedy() -> str:
    """What to do where a cluster asks for a token and this environment was not let in."""
    elsewhere = f"export {MODE}=token {TOKEN}=... (`ray get-auth-token` on the cluster's head node prints it)"
    source = token_source()
    if source is None:
        return elsewhere
    return f"the token in {source} is not this cluster's: {elsewhere}" if mode() == "token" else f"export {MODE}=token"
