"""Dictionaries and language models of others and ours: catalogue, fetching, publishing."""

import sparse_coding  # noqa: F401 - before torch, whose threads it keeps from spinning
