"""Programs that measure: run folders, imports and releases in, results/*.json out."""

import sparse_coding  # noqa: F401 - before torch, whose threads it keeps from spinning
