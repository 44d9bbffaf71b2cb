"""The published records, read once for every test of a process: reading all of them takes longer than judging them."""

from __future__ import annotations

from functools import cache

from skipstone_studies import record

read_all = cache(record.read_all)
