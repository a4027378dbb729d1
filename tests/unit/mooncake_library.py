"""Whether mooncake-transfer-engine is there to be tested with."""

from __future__ import annotations

import pytest

from transfer.mooncake.library import import_failure


def _missing() -> str:
    try:
        import mooncake.engine  # noqa: F401
    except ImportError as error:
        return import_failure(str(error))
    return ""


needs_library = pytest.mark.skipif(bool(_missing()), reason=_missing())
