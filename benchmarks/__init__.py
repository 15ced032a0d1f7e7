"""Programs that measure speed, memory and quality, ours beside other libraries'."""

import sparse_coding  # noqa: F401 - before torch, whose threads it keeps from spinning
