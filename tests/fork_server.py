"""Imported by the fork server alone: its processes keep it alive, so it has to end with its parent first."""

from tests.distributed import end_with_parent

end_with_parent()
