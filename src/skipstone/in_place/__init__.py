"""Mechanisms around the blocks of somebody else's decoder, in place: `skipstone.route`."""

from __future__ import annotations

from skipstone.in_place.handle import RoutedDecoder, route

__all__ = ["RoutedDecoder", "route"]
